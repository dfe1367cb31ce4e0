"""Which class serves which ``architectures`` name of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from penstock.executor.layers.attention import AttentionBatch, LayerCache
from penstock.executor.models.config import CONFIG_FILE, ModelConfig
from penstock.executor.models.errors import CheckpointError
from penstock.executor.models.llama import Llama


class Model(Protocol):
    """What the model runner asks of a family."""

    def forward(self, ids: Tensor, positions: Tensor, batch: AttentionBatch, caches: Sequence[LayerCache]) -> Tensor:
        """Hidden states [rows, hidden] of ``ids`` int64 [rows] at ``positions`` int64 [rows].

        Writes keys and values of these rows into ``caches``, one per layer.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, vocabulary] of hidden states [n, hidden]."""
        ...

    def destinations(self) -> dict[str, Tensor]:
        """For each tensor of a checkpoint the (part of a) parameter that it fills, of the same shape."""
        ...

    def spare(self) -> frozenset[str]:
        """Tensors that a checkpoint may hold and this model does not use."""
        ...


FAMILIES: dict[str, type[Llama]] = {"LlamaForCausalLM": Llama}


def build_model(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Model:
    """The model of ``config``, its parameters unset. Raises CheckpointError for a family that is not here."""
    family = FAMILIES.get(config.architecture)
    if family is None:
        fault = f"architecture {config.architecture!r} is not supported, only {', '.join(FAMILIES)}"
        raise CheckpointError(folder / CONFIG_FILE, fault)
    return family(config, dtype)
