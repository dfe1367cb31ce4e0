"""Qwen3, dense (Yang et al. 2025): Llama, with each query and key head normalised before it is rotated.

x += output(attention(rotate(norm(q), norm(k)), v))     of  norm(x)       in every layer

The two norms are over a head's components and their weights are shared by the heads of a layer. The size of a head is
its own number, not the share of a head in the hidden size.
"""

from __future__ import annotations

from penstock.executor.layers.norm import RMSNorm
from penstock.executor.models.llama import Llama, SelfAttention


class Qwen3(Llama):
    """See :class:`penstock.executor.models.registry.Model`."""

    def build_attention(self) -> SelfAttention:
        """Attention with normalised heads."""
        return SelfAttention(self.config, self.rotary, self.place, q_norm=self._head_norm(), k_norm=self._head_norm())

    def _head_norm(self) -> RMSNorm:
        return RMSNorm(self.config.head_dim, self.config.norm_eps, self.place)
