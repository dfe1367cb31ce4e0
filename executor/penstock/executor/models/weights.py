"""Weights: from the files of a checkpoint straight into the parameters of a model, one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from penstock.executor.models.checkpoint import TensorEntry, list_tensors, stream_tensors, tensor_bytes
from penstock.executor.models.errors import CheckpointError
from penstock.executor.models.registry import Model

ByteProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, after every tensor."""

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What a load amounts to."""

    digest: str
    """BLAKE2b-128 of names, dtypes, shapes and bytes, as hex; however the weights are sharded."""
    parameters: int
    weight_bytes: int
    """In the dtype of the model."""


def load_weights(model: Model, folder: Path, on_progress: ByteProgress) -> LoadedWeights:
    """Fill every parameter of ``model`` from the safetensors in ``folder``, converting to its dtype.

    All headers are checked before a byte of weights is read. Host memory beside the parameters: one tensor.
    Raises :class:`CheckpointError` naming file and tensor.
    """
    destinations = model.destinations()
    entries = _match(folder, list_tensors(folder), destinations, model.spare())
    total, done = sum(entry.size for entry in entries), 0
    digests: dict[str, bytes] = {}
    on_progress(done, total)
    for entry, tensor in stream_tensors(entries):
        digests[entry.name] = _digest(entry, tensor)
        destinations[entry.name].copy_(tensor)
        done += entry.size
        del tensor
        on_progress(done, total)
    whole = hashlib.blake2b(b"".join(digests[name] for name in sorted(digests)), digest_size=DIGEST_BYTES)
    return LoadedWeights(
        whole.hexdigest(),
        sum(tensor.numel() for tensor in destinations.values()),
        sum(tensor.nbytes for tensor in destinations.values()),
    )


def _match(
    folder: Path, entries: list[TensorEntry], destinations: dict[str, Tensor], spare: frozenset[str]
) -> list[TensorEntry]:
    """The entries that the model wants; each of the right shape, none missing, none unknown."""
    wanted = [entry for entry in entries if entry.name in destinations]
    for entry in entries:
        if entry.name not in destinations and entry.name not in spare:
            raise CheckpointError(entry.path, "is unexpected: the model of config.json has no such tensor", entry.name)
    for entry in wanted:
        expected = tuple(destinations[entry.name].shape)
        if entry.shape != expected:
            fault = f"has shape {list(entry.shape)}, config.json asks for {list(expected)}"
            raise CheckpointError(entry.path, fault, entry.name)
    for name in sorted(destinations.keys() - {entry.name for entry in wanted}):
        raise CheckpointError(entries[0].path if entries else folder, "is missing", name)
    return wanted


def _digest(entry: TensorEntry, tensor: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{entry.name}\0{entry.dtype}\0{entry.shape}".encode(), digest_size=DIGEST_BYTES)
    digest.update(tensor_bytes(tensor))
    return digest.digest()
