"""One rank's share of a model: of its configuration, and of the tensors of its checkpoint.

A rank has some of the heads and some of the inner features: rows of the matrices that make them, columns of those that
take them in. Which, follows from shapes alone: the model of the whole configuration and that of a rank's differ, for
each tensor, in one dimension or in none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from torch import Tensor

from penstock.executor.models.config import CONFIG_FILE, ModelConfig
from penstock.executor.models.errors import CheckpointError

SPREAD_ARCHITECTURES: Final = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
"""Those whose every product is of whole heads, or of inner features that stand alone."""


def rank_config(config: ModelConfig, size: int, folder: Path) -> ModelConfig:
    """What one of ``size`` ranks computes of the model in ``folder``.

    Raises CheckpointError if it cannot be spread over so many.
    """
    path = folder / CONFIG_FILE
    if size == 1:
        return config
    if config.architecture not in SPREAD_ARCHITECTURES:
        offered = ", ".join(sorted(SPREAD_ARCHITECTURES))
        raise CheckpointError(path, f"tensor_parallel is offered for {offered}, not for {config.architecture}")
    divided = {
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, number in divided.items():
        if number % size:
            raise CheckpointError(path, f"{name} {number} is not a multiple of tensor_parallel {size}")
    return replace(
        config,
        heads=config.heads // size,
        kv_heads=config.kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of a checkpoint's tensor a rank has."""

    whole: tuple[int, ...]
    """The tensor's shape: one dimension or two."""
    dim: int
    first: int
    """The first index of ``dim`` that is the rank's."""

    def of(self, tensor: Tensor, length: int) -> Tensor:
        """A view of the ``length`` indices of the whole ``tensor`` that are the rank's."""
        return tensor.narrow(self.dim, self.first, length)

    def copy(self, values: Tensor, start: int, destination: Tensor) -> None:
        """Of ``values``, elements of the whole tensor from number ``start`` on, copy those that belong there."""
        if self.dim == 0:
            self._copy_rows(values, start, destination)
        else:
            self._copy_columns(values, start, destination)

    def _copy_rows(self, values: Tensor, start: int, destination: Tensor) -> None:
        """Rows of the whole are consecutive elements."""
        flat = destination.view(-1)
        begins = self.first * (self.whole[1] if len(self.whole) > 1 else 1)
        low, high = max(start, begins), min(start + values.numel(), begins + flat.numel())
        if low < high:
            flat[low - begins : high - begins].copy_(values[low - start : high - start])

    def _copy_columns(self, values: Tensor, start: int, destination: Tensor) -> None:
        """The end of a row, whole rows, the beginning of a row: ``values`` may have each of them or not."""
        width, kept = self.whole[1], destination.shape[1]
        done, total = 0, values.numel()
        while done < total:
            row, column = divmod(start + done, width)
            rows = (total - done) // width if column == 0 else 0
            if rows:
                block = values[done : done + rows * width].view(rows, width)
                destination[row : row + rows].copy_(block[:, self.first : self.first + kept])
                done += rows * width
            else:
                count = min(width - column, total - done)
                self._copy_piece(values[done : done + count], column, destination[row])
                done += count

    def _copy_piece(self, piece: Tensor, column: int, destination: Tensor) -> None:
        """Part of one row, from ``column`` on, into that row's share."""
        low = max(column, self.first)
        high = min(column + piece.numel(), self.first + destination.numel())
        if low < high:
            destination[low - self.first : high - self.first].copy_(piece[low - column : high - column])


def find_shares(whole: Mapping[str, Tensor], own: Mapping[str, Tensor], rank: int) -> dict[str, Share]:
    """The tensors of which rank ``rank`` has a share; of the others it has all.

    ``whole``: for each tensor of the checkpoint the parameter that it fills in a model that is not spread; ``own``: in
    this rank's.
    """
    found: dict[str, Share] = {}
    for name, tensor in own.items():
        full, part = tuple(whole[name].shape), tuple(tensor.shape)
        differing = [dim for dim in range(len(part)) if full[dim] != part[dim]]
        if differing:
            (dim,) = differing
            found[name] = Share(full, dim, rank * part[dim])
    return found
