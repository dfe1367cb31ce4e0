"""Where the parameters of a model live."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.executor.layers.matmul import Products
from penstock.executor.layers.parallel import ALONE, Group


@dataclass(frozen=True, slots=True)
class Placement:
    """What all layers of one model share."""

    dtype: torch.dtype
    device: torch.device
    products: Products = field(default_factory=Products)
    group: Group = ALONE
    """The ranks that the model is spread over."""

    def empty(self, *shape: int) -> Tensor:
        """A parameter that the loader will fill."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)
