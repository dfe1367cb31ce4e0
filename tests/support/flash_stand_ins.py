"""What flash-attn's functions promise, in plain torch: they refuse what the library refuses, and read what it reads."""

from __future__ import annotations

import torch
from torch import Tensor


def stand_in_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float,
    causal: bool = False,
    out: Tensor,
) -> tuple[Tensor, None]:
    """``_flash_attn_fwd`` of flash-attn-4 4.0.0b36: its checks of shapes, and whole tiles read from pages of 128."""
    assert causal
    assert out.shape == q.shape
    if page_table is None:
        assert q.dim() == k.dim() == v.dim() == 4
        assert q.shape[:2] == k.shape[:2] == v.shape[:2]
        for batch in range(q.shape[0]):
            out[batch] = _attend(q[batch], k[batch], v[batch], k.shape[1], softmax_scale)
        return out, None
    assert cu_seqlens_q is not None
    assert seqused_k is not None
    sequences = cu_seqlens_q.shape[0] - 1
    assert page_table.dtype == cu_seqlens_q.dtype == seqused_k.dtype == torch.int32
    assert page_table.shape == (sequences, page_table.shape[1])
    assert page_table.stride(-1) == cu_seqlens_q.stride(0) == seqused_k.stride(0) == 1
    assert seqused_k.shape == (sequences,)
    for sequence in range(sequences):
        rows = slice(int(cu_seqlens_q[sequence]), int(cu_seqlens_q[sequence + 1]))
        used = int(seqused_k[sequence])
        assert used <= page_table.shape[1] * k.shape[1], "more tokens than the table has room for"
        key, value = _pages(k, v, page_table[sequence], used, whole=k.shape[1] == 128)
        out[rows] = _attend(q[rows], key, value, used, softmax_scale)
    return out, None


def stand_in_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """``flash_attn_varlen_func`` of flash-attn 2."""
    assert causal
    assert softmax_scale is not None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    out = torch.full_like(q, float("nan"))
    for sequence in range(cu_seqlens_q.shape[0] - 1):
        rows = slice(int(cu_seqlens_q[sequence]), int(cu_seqlens_q[sequence + 1]))
        keys = slice(int(cu_seqlens_k[sequence]), int(cu_seqlens_k[sequence + 1]))
        used = keys.stop - keys.start
        key, value = k[keys], v[keys]
        if block_table is not None:
            assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
            assert block_table.dtype == torch.int32
            assert block_table.shape == (cu_seqlens_q.shape[0] - 1, block_table.shape[1])
            key, value = _pages(k, v, block_table[sequence], used, whole=False)
        out[rows] = _attend(q[rows], key, value, used, softmax_scale)
    return out


def _pages(keys: Tensor, values: Tensor, table: Tensor, used: int, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Of one sequence [tokens, kv_heads, head_dim]; ``whole``: with what lies behind its end in the last page."""
    pages = table[: -(-used // keys.shape[1])].long()
    length = pages.numel() * keys.shape[1] if whole else used
    return keys[pages].flatten(0, 1)[:length], values[pages].flatten(0, 1)[:length]


def _attend(query: Tensor, key: Tensor, value: Tensor, used: int, scale: float) -> Tensor:
    """The last row sees the last of ``used`` keys. Hidden scores are replaced, hidden values are multiplied by zero."""
    group = query.shape[1] // key.shape[1]
    wide = [x.float().repeat_interleave(group, dim=1) for x in (key, value)]
    scores = torch.einsum("qhd,thd->hqt", query.float(), wide[0]) * scale
    last = torch.arange(used - query.shape[0], used, device=query.device)[:, None]
    hidden = torch.arange(key.shape[0], device=query.device) > last
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqt,thd->qhd", weights, wide[1]).to(query.dtype)
