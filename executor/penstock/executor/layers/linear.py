"""Linear maps. Matrices that share their input are one product; the checkpoint keeps them apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear


class Linear:
    """``x Wᵀ + b`` where the rows of ``W`` are several checkpoint matrices, one behind the other.

    ``Linear(64, {"q_proj": 64, "k_proj": 16, "v_proj": 16}, …)`` is one product of 96 outputs that three
    tensors fill. A matrix that stands alone is a map of one part.
    """

    def __init__(self, inputs: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype) -> None:
        """``parts``: checkpoint name and number of outputs, in order. The loader sets the parameters."""
        self.parts = dict(parts)
        outputs = sum(parts.values())
        self.weight = torch.empty(outputs, inputs, dtype=dtype)
        self.bias = torch.empty(outputs, dtype=dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] → [rows, all outputs]."""
        return linear(x, self.weight, self.bias)

    def destinations(self, name: str) -> dict[str, Tensor]:
        """The checkpoint tensors under ``name`` and the rows of this map that each fills."""
        sizes = list(self.parts.values())
        found: dict[str, Tensor] = {}
        for kind, parameter in (("weight", self.weight), ("bias", self.bias)):
            if parameter is not None:
                for part, rows in zip(self.parts, torch.split(parameter, sizes), strict=True):
                    found[f"{name}.{part}.{kind}"] = rows
        return found
