"""Root mean square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


class RMSNorm:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, the mean taken in float32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        """The weight is left unset: the loader fills it."""
        self.weight = torch.empty(size, dtype=dtype)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Same shape and dtype out."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)

    def destinations(self, name: str) -> dict[str, Tensor]:
        """The checkpoint tensor of the layer called ``name``, and what it fills."""
        return {f"{name}.weight": self.weight}
