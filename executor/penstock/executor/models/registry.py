"""Which class serves which ``architectures`` name of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from penstock.executor.layers.attention import AttentionStep, LayerCache
from penstock.executor.layers.few_rows import StepWeights
from penstock.executor.layers.parallel import ALONE, Group
from penstock.executor.models.config import ModelConfig
from penstock.executor.models.llama import Llama
from penstock.executor.models.qwen3 import Qwen3


class Model(Protocol):
    """What a worker asks of a family. Nothing here waits for the device; forward and logits can be captured."""

    hidden_size: int
    """Elements of a row between the layers."""

    def forward(
        self, ids: Tensor, step: AttentionStep, caches: Sequence[LayerCache], chosen: Tensor | None = None
    ) -> Tensor:
        """Hidden states, normalised, of ``ids`` int32 or int64 [rows].

        Writes keys and values of these rows into ``caches``, one per layer. ``chosen`` int32 or int64 [n], the rows
        whose next token is wanted: behind the last layer's attention only these go on, [n, hidden]; n may be 0. None:
        all rows, [rows, hidden].
        """
        ...

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, vocabulary] of hidden states [n, hidden], in the dtype of the model; written to ``out`` if given."""
        ...

    def last_layers(self, count: int) -> Model:
        """The same with its last ``count`` layers alone, of the same parameters."""
        ...

    def expect_absorbed_norms(self) -> None:
        """Before the parameters are set: what is launched or captured from now on counts on :meth:`absorb_norms`."""
        ...

    def absorb_norms(self) -> None:
        """Once the parameters are set: let products take over the weights of the norms before them.

        Steps of a size for which it is faster then normalise behind the product instead of before it.
        """
        ...

    def few_rows(self) -> StepWeights | None:
        """Its parameters for the kernels that compute whole steps of few rows; None: these do not take it.

        To be called when it is settled whether the norms are absorbed; the parameters may be set later.
        """
        ...

    def tune(self, rows: Sequence[int], limit_s: float, *, head: bool = True) -> None:
        """Choose the fastest products for steps of these numbers of ``rows``; on a GPU only, before any capture.

        Without ``head`` that of the logits is left out, which few rows of a large step get as far as.
        See :meth:`penstock.executor.layers.matmul.Products.tune`.
        """
        ...

    def destinations(self) -> dict[str, Tensor]:
        """For each tensor of a checkpoint the (part of a) parameter that it fills, of the same shape."""
        ...

    def spare(self) -> frozenset[str]:
        """Tensors that a checkpoint may hold and this model does not use."""
        ...


FAMILIES: Final[dict[str, Callable[[ModelConfig, torch.dtype, torch.device, Group], Model]]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Qwen3,
}
"""By the name in ``architectures``; what tells Mistral and Qwen2 from Llama is in the configuration alone."""


def build_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, group: Group = ALONE) -> Model:
    """The model of ``config`` on ``device``, its parameters unset. Raises RuntimeError if memory is short.

    In a group of several ranks ``config`` is that of one: :func:`penstock.executor.models.shares.rank_config`.
    """
    return FAMILIES[config.architecture](config, dtype, device, group)
