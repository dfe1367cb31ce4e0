"""The Llama family (Touvron et al. 2023; Grattafiori et al. 2024): every model that is shaped like it.

x  = embed(ids)
x += output(attention(rotate(q, k), v))     of  norm(x)       in every layer
x += down(silu(gate) · up)                  of  norm(x)
logits = head(norm(x))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

from penstock.executor.layers.attention import AttentionBatch, LayerCache, PagedAttention
from penstock.executor.layers.linear import Linear
from penstock.executor.layers.norm import RMSNorm
from penstock.executor.layers.rotary import RotaryEmbedding, Rotation
from penstock.executor.models.config import ModelConfig


class SelfAttention:
    """Grouped-query self-attention over pages, its three input products merged."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Parameters are left unset."""
        queries, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
        parts = {"q_proj": queries, "k_proj": shared, "v_proj": shared}
        self.qkv = Linear(config.hidden_size, parts, bias=config.attention_bias, dtype=dtype)
        self.attend = PagedAttention(config.heads, config.kv_heads, config.head_dim)
        self.output = Linear(queries, {"o_proj": config.hidden_size}, bias=config.attention_bias, dtype=dtype)

    def __call__(self, x: Tensor, rotation: Rotation, batch: AttentionBatch, cache: LayerCache) -> Tensor:
        """[rows, hidden] → [rows, hidden]."""
        return self.output(self.attend(self.qkv(x), rotation, batch, cache))


class FeedForward:
    """The gated feed-forward block, SwiGLU (Shazeer 2020), gate and up merged."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Parameters are left unset."""
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias, dtype=dtype)
        self.down = Linear(inner, {"down_proj": hidden}, bias=bias, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] → [rows, hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class Layer:
    """One block: attention and feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Parameters are left unset."""
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.attention = SelfAttention(config, dtype)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.feed_forward = FeedForward(config, dtype)

    def __call__(self, x: Tensor, rotation: Rotation, batch: AttentionBatch, cache: LayerCache) -> Tensor:
        """[rows, hidden] → [rows, hidden]."""
        x = x + self.attention(self.attention_norm(x), rotation, batch, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def destinations(self, name: str) -> dict[str, Tensor]:
        """The checkpoint tensors of the layer called ``name``, and what each fills."""
        return {
            **self.attention_norm.destinations(f"{name}.input_layernorm"),
            **self.attention.qkv.destinations(f"{name}.self_attn"),
            **self.attention.output.destinations(f"{name}.self_attn"),
            **self.feed_forward_norm.destinations(f"{name}.post_attention_layernorm"),
            **self.feed_forward.gate_up.destinations(f"{name}.mlp"),
            **self.feed_forward.down.destinations(f"{name}.mlp"),
        }


class Llama:
    """Embedding, layers, final norm and head; see :class:`penstock.executor.models.registry.Model`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Parameters are left unset: :func:`penstock.executor.models.weights.load_weights` fills them."""
        self.config, self.dtype = config, dtype
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope)
        self.layers = [Layer(config, dtype) for _ in range(config.layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.head = self.embedding if config.tied_head else torch.empty_like(self.embedding)

    def forward(self, ids: Tensor, positions: Tensor, batch: AttentionBatch, caches: Sequence[LayerCache]) -> Tensor:
        """Hidden states [rows, hidden], normalised, of ``ids`` int64 [rows] at ``positions`` int64 [rows]."""
        rotation = self.rotary.at(positions, self.dtype)
        x = embedding(ids, self.embedding)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotation, batch, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, vocabulary] of hidden states [n, hidden]."""
        return linear(hidden, self.head).float()

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
