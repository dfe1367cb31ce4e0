"""Linear maps. Matrices that share their input are one product; the checkpoint keeps them apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.executor.layers.norm import RMSNorm
from penstock.executor.layers.parallel import ALONE
from penstock.executor.layers.placement import Placement
from penstock.kernels.activation import silu_mul
from penstock.kernels.norm import Late
from penstock.kernels.product import gated_product, gated_shape, split_product, split_shape


class Linear:
    """``x Wᵀ + b`` where the rows of ``W`` are several checkpoint matrices, one behind the other.

    ``Linear(64, {"q_proj": 64, "k_proj": 16, "v_proj": 16}, …)`` is one product of 96 outputs that three
    tensors fill. A matrix that stands alone is a map of one part.
    """

    def __init__(
        self,
        inputs: int,
        parts: Mapping[str, int],
        place: Placement,
        *,
        bias: bool = False,
        adapter_rows: int = 0,
        partial: bool = False,
    ) -> None:
        """``parts``: checkpoint name and number of outputs, in order. The loader sets the parameters.

        ``partial``: ``inputs`` are this rank's share of the map's, so that results are sums over the ranks. Of any
        other map a rank may hold a share of the outputs, and need not know.

        ``adapter_rows`` zeroed rows stand in ``weight`` behind those of the parts: room for matrices of adapters, whose
        products with ``x`` are then part of the same product.
        """
        self.parts = dict(parts)
        outputs = sum(parts.values())
        self.weight = place.empty(outputs + adapter_rows, inputs)
        self.weight[outputs:].zero_()
        self.bias = place.empty(outputs) if bias else None
        self.base = self.weight[:outputs]
        """[all outputs, inputs]: without the rows of adapters."""
        self._products = place.products
        self._group = place.group if partial else ALONE

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] → [rows, all outputs]; no adapter takes part."""
        bias = self.bias if self._group.rank == 0 else None  # a sum over the ranks has it once
        return self._group.all_reduce(self._products(x, self.base, bias))

    def product(self, x: Tensor) -> Tensor:
        """The same without the bias: for whoever adds it in passing."""
        return self._group.all_reduce(self._products(x, self.base))

    def absorb(self, norm: RMSNorm) -> None:
        """Take over the weight of the norm of this map's input; what is left of the norm is a factor for each row.

        It is a factor of the product, not of the bias.
        """
        self.weight.mul_(norm.weight)
        norm.weight.fill_(1)

    def onto(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add the map of ``x`` [rows, inputs] to ``residual`` [rows, all outputs], in place; without a bias only."""
        if self._group.size > 1:  # the residual is no part of the sum over the ranks
            return residual.add_(self(x))
        return self._products.add_to(residual, x, self.base)

    def in_parts(self, x: Tensor) -> Tensor:
        """The same, or float32 [parts, rows, all outputs] of which it is the sum, where that is faster: for a norm."""
        whole = self.bias is None and self._group.size == 1
        shape = split_shape(x, self.base) if whole else None
        return self(x) if shape is None else split_product(x, self.base, shape)

    def gated(self, x: Tensor, late: Late | None = None) -> Tensor:
        """[rows, inputs] → [rows, half of the outputs]: ``silu`` of the first half times the second.

        ``late``: the normalisation of ``x``, if that is still to come.
        """
        if late is not None:
            return silu_mul(self(x), late)
        shape = gated_shape(x, self.base) if self.bias is None else None
        return silu_mul(self(x)) if shape is None else gated_product(x, self.base, shape)

    def destinations(self, name: str) -> dict[str, Tensor]:
        """The checkpoint tensors under ``name`` and the rows of this map that each fills."""
        sizes = list(self.parts.values())
        found: dict[str, Tensor] = {}
        for kind, parameter in (("weight", self.base), ("bias", self.bias)):
            if parameter is not None:
                for part, rows in zip(self.parts, torch.split(parameter, sizes), strict=True):
                    found[f"{name}.{part}.{kind}"] = rows
        return found
