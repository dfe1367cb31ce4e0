"""Rotary position embedding (Su et al. 2021); context extensions "linear" (Chen et al. 2023) and "llama3"."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.executor.models.config import RopeConfig


class Rotation(NamedTuple):
    """Cosine and sine of every row's angles, [rows, 1, head_dim / 2]; the same for all layers and heads."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Turn ``x`` [rows, heads, head_dim]: components ``i`` and ``i + head_dim / 2`` are a pair."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)


class RotaryEmbedding:
    """The angles of positions. Frequencies and angles are float32 whatever the model's dtype."""

    def __init__(self, head_dim: int, rope: RopeConfig, max_positions: int, device: torch.device) -> None:
        """``head_dim`` is even."""
        self.frequencies = _frequencies(head_dim, rope)
        self._max_positions, self._device = max_positions, device

    @functools.cached_property
    def table(self) -> Tensor:
        """Cosines and sines of every position, float32 [max_positions, head_dim], cosines in the first half."""
        angles = torch.arange(self._max_positions, dtype=torch.float32)[:, None] * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1).to(self._device)

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of rows at ``positions`` int64 [rows], in ``dtype``."""
        angles = (positions.float()[:, None] * self.frequencies)[:, None]
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def _frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    trained = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return trained / rope.factor
    if rope.kind == "llama3":
        return _llama3(trained, rope)
    return trained


def _llama3(trained: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are slowed by the factor, short ones kept, those between blended (Llama 3.1 release)."""
    waves = rope.original_max_positions * trained / (2 * math.pi)
    blend = (waves - rope.low_frequency_factor) / (rope.high_frequency_factor - rope.low_frequency_factor)
    keep = blend.clamp(0, 1)
    return trained * (keep + (1 - keep) / rope.factor)
