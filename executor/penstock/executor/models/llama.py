"""The Llama family (Touvron et al. 2023; Grattafiori et al. 2024): every model that is shaped like it.

Mistral (Jiang et al. 2023) and Qwen2 (Yang et al. 2024) are, but for what :class:`ModelConfig` says: a window of
attention, biases of queries, keys and values.

x  = embed(ids)
x += output(attention(rotate(q, k), v))     of  norm(x)       in every layer
x += down(silu(gate) · up)                  of  norm(x)
logits = head(norm(x))

``x`` is the residual stream. A block hands on what is to be added to it, and the next norm adds and normalises at once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from penstock.executor.layers.attention import AttentionStep, LayerCache, PagedAttention
from penstock.executor.layers.few_rows import LayerWeights, StepWeights
from penstock.executor.layers.linear import Linear
from penstock.executor.layers.norm import RMSNorm
from penstock.executor.layers.parallel import ALONE, Group
from penstock.executor.layers.placement import Placement
from penstock.executor.layers.rotary import RotaryEmbedding
from penstock.executor.models.config import ModelConfig
from penstock.kernels.gemv.attention import HeadNorms
from penstock.kernels.gemv.product import Norm
from penstock.kernels.gemv.shapes import LayerSizes
from penstock.kernels.norm import late_pays


class SelfAttention:
    """Grouped-query self-attention over pages, its three input products merged."""

    def __init__(
        self,
        config: ModelConfig,
        rotary: RotaryEmbedding,
        place: Placement,
        *,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        """Parameters are left unset. Llama has no norms of heads; see :class:`PagedAttention` for families that do."""
        queries, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
        parts = {"q_proj": queries, "k_proj": shared, "v_proj": shared}
        self.qkv = Linear(config.hidden_size, parts, place, bias=config.qkv_bias)
        self.attend = PagedAttention(
            config.heads, config.kv_heads, config.head_dim, rotary, bias=self.qkv.bias, q_norm=q_norm, k_norm=k_norm
        )
        self.output = Linear(queries, {"o_proj": config.hidden_size}, place, bias=config.output_bias, partial=True)

    def __call__(self, x: Tensor, step: AttentionStep, cache: LayerCache, chosen: Tensor | None) -> Tensor:
        """[rows, hidden] → [rows, hidden]; of the ``chosen`` rows only unless that is None."""
        attended = self.attend(self.qkv.product(x), step, cache)
        return self.output.in_parts(attended if chosen is None else attended.index_select(0, chosen))

    def onto(
        self, stream: Tensor, norm: RMSNorm, step: AttentionStep, cache: LayerCache, chosen: Tensor | None
    ) -> Tensor:
        """The same of the normalised ``stream``, the norm's weight absorbed, and added to it."""
        attended = self.attend(self.qkv.product(stream), step, cache, norm.late(stream))
        if chosen is not None:
            attended, stream = attended.index_select(0, chosen), stream.index_select(0, chosen)
        return self.output.onto(attended, stream)

    def destinations(self, name: str) -> dict[str, Tensor]:
        """The checkpoint tensors of the block called ``name``, and what each fills."""
        found = self.qkv.destinations(name) | self.output.destinations(name)
        for part, norm in (("q_norm", self.attend.q_norm), ("k_norm", self.attend.k_norm)):
            if norm is not None:
                found |= norm.destinations(f"{name}.{part}")
        return found


class FeedForward:
    """The gated feed-forward block, SwiGLU (Shazeer 2020), gate and up merged."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        """Parameters are left unset."""
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(hidden, {"gate_proj": inner, "up_proj": inner}, place, bias=bias)
        self.down = Linear(inner, {"down_proj": hidden}, place, bias=bias, partial=True)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] → [rows, hidden], perhaps in parts (:meth:`Linear.in_parts`)."""
        return self.down.in_parts(self.gate_up.gated(x))

    def onto(self, stream: Tensor, norm: RMSNorm) -> Tensor:
        """The same of the normalised ``stream``, the norm's weight absorbed, and added to it."""
        return self.down.onto(self.gate_up.gated(stream, norm.late(stream)), stream)

    def destinations(self, name: str) -> dict[str, Tensor]:
        """The checkpoint tensors of the block called ``name``, and what each fills."""
        return self.gate_up.destinations(name) | self.down.destinations(name)


class Layer:
    """Attention and feed-forward, each of a normalised copy of the residual stream."""

    def __init__(self, attention: SelfAttention, config: ModelConfig, place: Placement) -> None:
        """Parameters are left unset."""
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.feed_forward = FeedForward(config, place)
        self.absorbed = False

    def expect_absorbed_norms(self) -> None:
        """From now on compute as if :meth:`absorb_norms` had been called, unless biases are in the way.

        That of queries, keys and values is not: attention adds it behind the norm's factor. The others would be scaled
        by it, or are of products that add to the stream.
        """
        self.absorbed = all(linear.bias is None for linear in self.linears()[1:])

    def absorb_norms(self) -> None:
        """Make the norms' weights part of the products behind them, where that is possible."""
        self.expect_absorbed_norms()
        if self.absorbed:
            self.attention.qkv.absorb(self.attention_norm)
            self.feed_forward.gate_up.absorb(self.feed_forward_norm)

    def __call__(
        self, x: Tensor, residual: Tensor | None, step: AttentionStep, cache: LayerCache, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` [rows, hidden] is to be added to the ``residual`` stream, None where it begins.

        Returns the same pair for the next layer; of the ``chosen`` rows only unless that is None.
        """
        if residual is None and self.absorbed and late_pays(x.shape[0], x.shape[1]):
            x = self.attention.onto(x, self.attention_norm, step, cache, chosen)
            return self.feed_forward.onto(x, self.feed_forward_norm), None
        x, residual = self.attention_norm(x, residual)
        x = self.attention(x, step, cache, chosen)
        x, residual = self.feed_forward_norm(x, residual if chosen is None else residual.index_select(0, chosen))
        return self.feed_forward(x), residual

    def few_rows(self) -> LayerWeights | None:
        """Its parameters for steps of few rows; None: those have no place for its biases."""
        attend, feed_forward = self.attention.attend, self.feed_forward
        if any(linear.bias is not None for linear in self.linears()[1:]):
            return None
        head_norms = None
        if attend.q_norm is not None and attend.k_norm is not None:
            head_norms = HeadNorms(attend.q_norm.weight, attend.k_norm.weight, attend.q_norm.eps)
        return LayerWeights(
            self._norm_before(self.attention_norm),
            self.attention.qkv.base,
            self.attention.qkv.bias,
            head_norms,
            self.attention.output.base,
            self._norm_before(self.feed_forward_norm),
            feed_forward.gate_up.base,
            feed_forward.down.base,
        )

    def _norm_before(self, norm: RMSNorm) -> Norm:
        return Norm(None if self.absorbed else norm.weight, norm.eps)

    def linears(self) -> tuple[Linear, ...]:
        """The products of the layer."""
        return self.attention.qkv, self.attention.output, self.feed_forward.gate_up, self.feed_forward.down

    def destinations(self, name: str) -> dict[str, Tensor]:
        """The checkpoint tensors of the layer called ``name``, and what each fills."""
        return {
            **self.attention_norm.destinations(f"{name}.input_layernorm"),
            **self.attention.destinations(f"{name}.self_attn"),
            **self.feed_forward_norm.destinations(f"{name}.post_attention_layernorm"),
            **self.feed_forward.destinations(f"{name}.mlp"),
        }


class Llama:
    """Embedding, layers, final norm and head; see :class:`penstock.executor.models.registry.Model`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, group: Group = ALONE) -> None:
        """Parameters are left unset: :mod:`penstock.executor.models.weights` fills them.

        ``config`` has the heads and the inner size of this rank of ``group``. Embedding, norms and head are whole in
        every rank.
        """
        self.config, self.hidden_size = config, config.hidden_size
        self.place = Placement(dtype, device, group=group)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope, config.max_positions, device)
        self.embedding = self.place.empty(config.vocab_size, config.hidden_size)
        self.layers = [Layer(self.build_attention(), config, self.place) for _ in range(config.layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, self.place)
        self.head = self.embedding if config.tied_head else torch.empty_like(self.embedding)

    def build_attention(self) -> SelfAttention:
        """The attention of one layer: what families that are shaped like Llama differ in."""
        return SelfAttention(self.config, self.rotary, self.place)

    def forward(
        self, ids: Tensor, step: AttentionStep, caches: Sequence[LayerCache], chosen: Tensor | None = None
    ) -> Tensor:
        """Normalised hidden states; see :class:`penstock.executor.models.registry.Model`."""
        x: Tensor = embedding(ids, self.embedding)
        residual: Tensor | None = None
        for layer, cache in zip(self.layers[:-1], caches[:-1], strict=True):
            x, residual = layer(x, residual, step, cache)
        x, residual = self.layers[-1](x, residual, step, caches[-1], chosen)
        return self.norm(x, residual)[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, vocabulary] of hidden states [n, hidden], in their dtype."""
        return self.place.products(hidden, self.head, out=out)

    def last_layers(self, count: int) -> Llama:
        """See :class:`penstock.executor.models.registry.Model`."""
        part = copy.copy(self)
        part.layers = self.layers[-count:]
        return part

    def expect_absorbed_norms(self) -> None:
        """See :class:`penstock.executor.models.registry.Model`."""
        for layer in self.layers:
            layer.expect_absorbed_norms()

    def absorb_norms(self) -> None:
        """See :class:`penstock.executor.models.registry.Model`."""
        for layer in self.layers:
            layer.absorb_norms()

    def tune(self, rows: Sequence[int], limit_s: float, *, head: bool = True) -> None:
        """See :class:`penstock.executor.models.registry.Model`."""
        weights = [linear.weight for layer in self.layers for linear in layer.linears()]
        self.place.products.tune(rows, [*weights, *([self.head] if head else [])], limit_s=limit_s)

    def few_rows(self) -> StepWeights | None:
        """See :class:`penstock.executor.models.registry.Model`."""
        layers = [layer.few_rows() for layer in self.layers]
        config = self.config
        if self.place.group.size > 1 or any(layer is None for layer in layers):
            return None  # those kernels add up nothing over the ranks
        return StepWeights(
            LayerSizes(
                config.hidden_size,
                config.intermediate_size,
                config.heads,
                config.kv_heads,
                config.head_dim,
                config.vocab_size,
            ),
            self.embedding,
            [layer for layer in layers if layer is not None],
            Norm(self.norm.weight, self.norm.eps),
            self.head,
            self.rotary.table,
            self.layers[0].attention.attend.scale,
        )

    def destinations(self) -> dict[str, Tensor]:
        """For each tensor of a checkpoint the (part of a) parameter that it fills."""
        found = {"model.embed_tokens.weight": self.embedding, **self.norm.destinations("model.norm")}
        for number, layer in enumerate(self.layers):
            found |= layer.destinations(f"model.layers.{number}")
        if not self.config.tied_head:
            found["lm_head.weight"] = self.head
        return found

    def spare(self) -> frozenset[str]:
        """A copy of a tied head, and the rotary frequencies that old exports carry."""
        names = {f"model.layers.{number}.self_attn.rotary_emb.inv_freq" for number in range(self.config.layers)}
        return frozenset(names | ({"lm_head.weight"} if self.config.tied_head else set()))
