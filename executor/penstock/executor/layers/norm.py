"""Root mean square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

from torch import Tensor

from penstock.executor.layers.placement import Placement
from penstock.kernels.norm import Late, add_rms_norm


class RMSNorm:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, the mean taken in float32."""

    def __init__(self, size: int, eps: float, place: Placement) -> None:
        """The weight is left unset: the loader fills it."""
        self.weight = place.empty(size)
        self.eps = eps

    def late(self, stream: Tensor) -> Late:
        """Its normalisation of ``stream`` [rows, size], for whoever reads a product that took over its weight."""
        return Late(stream, self.eps)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add ``x`` [rows, size] to the residual stream, in place, and normalise the sum.

        None: the stream begins with ``x``. Returns the normalised sum and the stream.
        """
        return add_rms_norm(x, residual, self.weight, self.eps)

    def destinations(self, name: str) -> dict[str, Tensor]:
        """The checkpoint tensor of the layer called ``name``, and what it fills."""
        return {f"{name}.weight": self.weight}
