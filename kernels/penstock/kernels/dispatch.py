"""Which implementation of an operation runs: Triton where tensors are on a GPU, plain torch elsewhere."""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU, one program after another: for tests. Set before triton is imported."""

SMALL_MODEL = 2048
"""Elements of a row between the layers up to which a model counts as small where measured limits differ by that."""


def uses_triton(tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` is computed by its kernel rather than by its torch reference."""
    return tensor.is_cuda or INTERPRETED


def full_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` for operands of ``dtype``: float32 stays float32 (the default is tf32)."""
    return "ieee" if dtype == torch.float32 else "tf32"
