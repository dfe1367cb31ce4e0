"""Attention of a short fresh prompt by cuDNN, as torch offers it: a peer of those that are used."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from penstock.kernels.attention.chunks import AttentionShape, LoneKernel

CUDNN_ROWS: Final = 1024
"""Of a prompt: it plans for every shape that it meets, and is slower than others already below that."""


def cudnn_refusal(shape: AttentionShape) -> str | None:
    """Why cuDNN cannot attend chunks of ``shape``, in one line; None: it can."""
    if shape.device.type != "cuda":
        return f"cuDNN needs an NVIDIA GPU, the device is {shape.device}"
    available = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    if not available or torch.cuda.get_device_capability(shape.device)[0] < 9:
        return "cuDNN attends on compute capability 9.0 and above only"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"cuDNN computes in bfloat16 or float16, the model in {str(shape.dtype).removeprefix('torch.')}"
    if shape.head_dim % 8 or shape.head_dim > 128:
        return f"cuDNN takes heads of multiples of 8 up to 128, the model's have {shape.head_dim}"
    return None


def cudnn_lone() -> LoneKernel:
    """For up to CUDNN_ROWS rows."""
    return LoneKernel("cudnn", cudnn_attention, ())


def cudnn_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
    """See :class:`penstock.kernels.attention.chunks.LoneAttention`. Raises RuntimeError if cuDNN refuses the shape."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        made = scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None],
            is_causal=True, scale=scale, enable_gqa=query.shape[1] != keys.shape[1],
        )  # fmt: skip
    out.copy_(made[0].transpose(0, 1))
