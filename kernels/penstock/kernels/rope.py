"""Between the QKV product and attention: bias, QK-norm, rotary embedding, keys and values into their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.dispatch import uses_triton
from penstock.kernels.norm import Late, finish_product, rms_norm_reference


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    heads: int,
    kv_heads: int,
    late: Late | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Normalise and rotate queries and keys, and store keys and values.

    ``qkv`` [rows, (heads + 2 · kv_heads) · head_dim], contiguous; ``positions`` int32 [rows]; ``cos_sin`` float32
    [max_positions, head_dim], cosines in its first half; ``q_weight``, ``k_weight`` [head_dim], both or neither:
    normalise each head before the rotation as :func:`penstock.kernels.norm.add_rms_norm` does (Qwen3); ``keys``,
    ``values`` [blocks, block_tokens, kv_heads, head_dim], contiguous; ``slot_mapping`` int64 [rows]: where in them,
    seen as [blocks · block_tokens, …], each row goes. Of rows that go to the same place any may stay there. Places are
    not checked. ``late``: ``qkv`` is still to be scaled by it. ``bias`` [(heads + 2 · kv_heads) · head_dim]: is added
    after that (Qwen2); what is rounded is the sum.

    Components ``i`` and ``i + head_dim / 2`` are a pair (Su et al. 2021), rotated in float32. Returns the queries
    [rows, heads, head_dim].
    """
    arguments = (
        qkv, positions, cos_sin, q_weight, k_weight, eps, keys, values, slot_mapping, heads, kv_heads, late, bias
    )  # fmt: skip
    if uses_triton(qkv):
        from penstock.kernels.rope_kernel import rotate_and_store_triton

        return rotate_and_store_triton(*arguments)
    return rotate_and_store_reference(*arguments)


def rotate_and_store_reference(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    heads: int,
    kv_heads: int,
    late: Late | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same in plain torch."""
    qkv = finish_product(qkv, late, bias)
    split = qkv.view(qkv.shape[0], heads + 2 * kv_heads, keys.shape[-1])
    query, key, value = split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]
    if q_weight is not None:
        query = rms_norm_reference(query, q_weight, eps)
    if k_weight is not None:
        key = rms_norm_reference(key, k_weight, eps)
    cos, sin = cos_sin[positions.long()][:, None].chunk(2, dim=-1)
    keys.view(-1, *keys.shape[2:]).index_copy_(0, slot_mapping, _rotate(key, cos, sin))
    values.view(-1, *values.shape[2:]).index_copy_(0, slot_mapping, value)
    return _rotate(query, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
