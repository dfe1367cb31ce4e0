"""Checkpoint folders of safetensors files, read without trusting them.

A safetensors file is an unsigned 64-bit little-endian length, that many bytes of JSON (name → dtype, shape
and the range of its bytes behind the header), then the bytes. Nothing is parsed before the length was held
against the size of the file, and nothing is allocated before every tensor's range, dtype and shape agree.
Pickled files are never opened.

Every fault is a :class:`~penstock.executor.models.errors.CheckpointError`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.executor.models.config import JsonObject, read_json_object
from penstock.executor.models.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLED_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES: Final = 100_000_000
"""The limit that the format's own library has."""
LENGTH_BYTES: Final = 8
METADATA_KEY: Final = "__metadata__"
WEIGHT_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor's bytes are."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


def list_tensors(folder: Path) -> list[TensorEntry]:
    """Every tensor of the checkpoint, from ``model.safetensors`` or from the shards of its index."""
    if not folder.is_dir():
        raise CheckpointError(folder, "no such folder")
    if (folder / SINGLE_FILE).exists():
        return list(read_header(folder / SINGLE_FILE).values())
    if (folder / INDEX_FILE).exists():
        return _list_shards(folder)
    pickled = sorted(path for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise CheckpointError(pickled[0], "pickled checkpoints are refused, only safetensors are read")
    raise CheckpointError(folder / SINGLE_FILE, f"no such file, and no {INDEX_FILE} beside it")


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of a tensor, few enough to be read at once."""

    entry: TensorEntry
    start: int
    """Element."""
    count: int
    """Elements."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.entry.dtype.itemsize


def split_tensor(entry: TensorEntry, max_bytes: int) -> list[Piece]:
    """The pieces of a tensor in order: all of ``max_bytes``, a multiple of four, but the last."""
    elements, step = entry.size // entry.dtype.itemsize, max_bytes // entry.dtype.itemsize
    return [Piece(entry, start, min(step, elements - start)) for start in range(0, elements, step)]


@contextmanager
def open_files(entries: Iterable[TensorEntry]) -> Iterator[dict[Path, BinaryIO]]:
    """The files of these tensors, each opened once."""
    with ExitStack() as stack:
        yield {path: stack.enter_context(_open(path)) for path in dict.fromkeys(entry.path for entry in entries)}


def read_piece(file: BinaryIO, piece: Piece, memory: memoryview) -> None:
    """Fill ``memory``, ``piece.size`` bytes. Any number of threads may read one file."""
    entry, done = piece.entry, 0
    first = entry.offset + piece.start * entry.dtype.itemsize
    while done < piece.size:
        try:
            read = os.preadv(file.fileno(), [memory[done:]], first + done)
        except OSError as error:
            raise CheckpointError(entry.path, f"cannot be read: {error.strerror}", entry.name) from None
        if not read:
            raise CheckpointError(entry.path, f"is truncated: it ends at byte {first + done}", entry.name)
        done += read


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, ordered by offset."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(path, file.read(LENGTH_BYTES), size)
        header = _parse_header(path, file.read(length))
    start = LENGTH_BYTES + length
    entries = [_entry(path, name, value, start) for name, value in header.items() if name != METADATA_KEY]
    entries.sort(key=lambda entry: entry.offset)
    _check_extent(path, entries, start, size)
    return {entry.name: entry for entry in entries}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    flat: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.data


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from None


def _header_length(path: Path, prefix: bytes, file_size: int) -> int:
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(path, f"is truncated: {len(prefix)} bytes are no safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(path, f"header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if length > file_size - LENGTH_BYTES:
        raise CheckpointError(path, f"is truncated: header claims {length} bytes, the file has {file_size}")
    return length


def _parse_header(path: Path, data: bytes) -> JsonObject:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(path, "is corrupt: its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(path, "is corrupt: its header is not a JSON object")
    return header


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    fields = cast(JsonObject, value) if isinstance(value, dict) else {}
    shape, offsets, code = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(cast(list[int], offsets)) != 2:
        raise CheckpointError(path, "is corrupt: shape or data_offsets in the header are garbled", name)
    dtype = WEIGHT_DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(path, f"dtype {code!r} is not supported, only {', '.join(WEIGHT_DTYPES)}", name)
    begin, end = cast(list[int], offsets)
    size = math.prod(cast(list[int], shape)) * dtype.itemsize
    if end - begin != size:
        fault = f"is corrupt: shape {shape} of {code} needs {size} bytes, the header gives it {end - begin}"
        raise CheckpointError(path, fault, name)
    return TensorEntry(path, name, dtype, tuple(cast(list[int], shape)), data_start + begin, size)


def _check_extent(path: Path, entries: list[TensorEntry], start: int, file_size: int) -> None:
    """The tensors lie one behind the other and fill the file."""
    expected = start
    for entry in entries:
        if entry.offset != expected:
            raise CheckpointError(path, "is corrupt: its bytes overlap others or leave a gap", entry.name)
        expected += entry.size
        if expected > file_size:
            fault = f"is truncated: needs bytes up to {expected}, the file has {file_size}"
            raise CheckpointError(path, fault, entry.name)
    if expected != file_size:
        raise CheckpointError(path, f"is corrupt: {file_size - expected} bytes behind its last tensor")


def _is_naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _list_shards(folder: Path) -> list[TensorEntry]:
    index = folder / INDEX_FILE
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise CheckpointError(index, "has no weight_map")
    for name, shard in shard_of.items():
        # A bare name in this folder: an index must not be able to point at any other file.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(index, f"names {shard!r:.80}, which is no safetensors file of this folder", name)
    entries: list[TensorEntry] = []
    for shard in sorted(set(shard_of.values())):
        entries += _list_shard(folder / shard, {name for name, file in shard_of.items() if file == shard})
    return entries


def _list_shard(path: Path, indexed: set[str]) -> list[TensorEntry]:
    found = read_header(path)
    for name in sorted(indexed - found.keys()):
        raise CheckpointError(path, f"is missing, though {INDEX_FILE} has it here", name)
    for name in sorted(found.keys() - indexed):
        raise CheckpointError(path, f"is unexpected: {INDEX_FILE} does not have it here", name)
    return list(found.values())
