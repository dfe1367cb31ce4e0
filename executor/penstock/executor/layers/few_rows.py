"""A model's parameters as the kernels for steps of few rows take them: see :mod:`penstock.kernels.gemv`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from penstock.kernels.gemv.attention import HeadNorms
from penstock.kernels.gemv.product import Norm
from penstock.kernels.gemv.shapes import LayerSizes


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; matrices are [outputs, inputs], those that share their input one behind the other."""

    attention_norm: Norm
    qkv: Tensor
    qkv_bias: Tensor | None
    head_norms: HeadNorms | None
    output: Tensor
    feed_forward_norm: Norm
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class StepWeights:
    """All that a step reads but its state and its pages."""

    sizes: LayerSizes
    embedding: Tensor
    layers: Sequence[LayerWeights]
    norm: Norm
    head: Tensor
    cos_sin: Tensor
    """float32 [positions, head_dim], cosines first"""
    scale: float
    """Of attention's scores."""
