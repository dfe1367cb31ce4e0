"""Weights: from the files of a checkpoint into the parameters of a model, piece by piece; or drawn at random."""

from __future__ import annotations

import hashlib
import math
import queue
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final

import torch
from torch import Tensor

from penstock.executor.models.checkpoint import (
    Piece,
    TensorEntry,
    list_tensors,
    open_files,
    read_piece,
    split_tensor,
    tensor_bytes,
)
from penstock.executor.models.errors import CheckpointError
from penstock.executor.models.registry import Model
from penstock.executor.models.shares import Share

ByteProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, after every piece."""

DIGEST_BYTES: Final = 16
PIECE_BYTES: Final = 16 * 2**20
"""Part of what a digest is: pieces are hashed one by one."""
HOST_READERS: Final = 1
"""Threads that load onto a CPU: every thread that converts on the host would bring threads of torch's own with it."""
GPU_READERS: Final = 8
"""Threads that read, hash and copy to a GPU: one alone hashes about 1 GB/s."""
DUMMY_STD: Final = 0.02
Shares = Mapping[str, Share]
NO_SHARES: Final[Shares] = MappingProxyType({})
"""Of a model that is not spread over ranks."""


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What a load amounts to."""

    digest: str
    """BLAKE2b-128 of names, dtypes, shapes and bytes, as hex, however the weights are sharded; "dummy-…" if drawn."""
    parameters: int
    """Of the whole model, however many ranks share it."""
    weight_bytes: int
    """In the dtype of the model; this rank's."""

    @classmethod
    def of(cls, digest: str, destinations: dict[str, Tensor], shares: Shares) -> LoadedWeights:
        """Add up the parameters."""
        parameters = sum(math.prod(_whole_shape(name, tensor, shares)) for name, tensor in destinations.items())
        return cls(digest, parameters, sum(tensor.nbytes for tensor in destinations.values()))


def load_weights(model: Model, folder: Path, on_progress: ByteProgress, shares: Shares = NO_SHARES) -> LoadedWeights:
    """Fill every parameter of ``model`` from the safetensors in ``folder``, converting to its dtype.

    All headers are checked before a byte of weights is read. Host memory beside the parameters: a piece for each of
    the threads that read, which are several for a GPU. Raises :class:`CheckpointError` naming file and tensor.

    ``shares``: the tensors of which ``model`` has a part only. Every rank reads and hashes all of each tensor, so that
    all know the whole checkpoint's digest.
    """
    destinations = model.destinations()
    entries = _match(folder, list_tensors(folder), destinations, model.spare(), shares)
    pieces = [piece for entry in entries for piece in split_tensor(entry, PIECE_BYTES)]
    total, done = sum(entry.size for entry in entries), 0
    hashes: defaultdict[str, list[bytes]] = defaultdict(list)
    on_progress(done, total)
    with open_files(entries) as files, _loaded(pieces, files, destinations, shares) as digests:
        for piece, digest in zip(pieces, digests, strict=True):
            hashes[piece.entry.name].append(digest)
            done += piece.size
            on_progress(done, total)
    whole = b"".join(_digest(entry, hashes[entry.name]) for entry in sorted(entries, key=lambda entry: entry.name))
    return LoadedWeights.of(hashlib.blake2b(whole, digest_size=DIGEST_BYTES).hexdigest(), destinations, shares)


def draw_weights(model: Model, seed: int = 0, shares: Shares = NO_SHARES) -> LoadedWeights:
    """Draw every matrix of ``model`` from N(0, 0.02); norms are ones, biases zeros. For measurements.

    The same ``seed`` gives the same weights on the same kind of device, each rank its ``shares`` of them.
    """
    destinations = model.destinations()
    for number, (name, tensor) in enumerate(destinations.items()):
        if tensor.dim() == 1:
            tensor.fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            generator = torch.Generator(tensor.device).manual_seed(seed + number)
            share = shares.get(name)
            if share is None:
                tensor.normal_(0, DUMMY_STD, generator=generator)
            else:
                whole = tensor.new_empty(share.whole).normal_(0, DUMMY_STD, generator=generator)
                tensor.copy_(share.of(whole, tensor.shape[share.dim]))
    return LoadedWeights.of(f"dummy-{seed}", destinations, shares)


@contextmanager
def _loaded(
    pieces: list[Piece], files: dict[Path, BinaryIO], destinations: dict[str, Tensor], shares: Shares
) -> Iterator[Iterator[bytes]]:
    """Load the pieces; their hashes, in order, each once the piece is where it belongs."""
    device = next(iter(destinations.values())).device
    on_gpu = device.type == "cuda"
    threads = max(1, min(GPU_READERS if on_gpu else HOST_READERS, len(pieces)))
    size = max((piece.size for piece in pieces), default=0)
    # Each on a stream of its own: whoever works on the device meanwhile is not held up, nor are captures disturbed.
    streams = [torch.cuda.Stream(device) for _ in range(threads)] if on_gpu else [None] * threads  # type: ignore[no-untyped-call]
    staging: queue.SimpleQueue[tuple[Tensor, torch.cuda.Stream | None]] = queue.SimpleQueue()
    for stream in streams:
        staging.put((torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu), stream))

    def load(piece: Piece) -> bytes:
        memory, stream = staging.get_nowait()  # there is one for each thread
        try:
            name, file = piece.entry.name, files[piece.entry.path]
            with torch.cuda.stream(stream):
                digest = _load(piece, file, memory[: piece.size], destinations[name], shares.get(name))
            if stream is not None:
                stream.synchronize()
            return digest
        finally:
            staging.put((memory, stream))

    if threads == 1:
        yield map(load, pieces)
        return
    with ThreadPoolExecutor(threads, "penstock-load") as pool:
        try:
            yield pool.map(load, pieces)
        finally:
            pool.shutdown(cancel_futures=True)


def _load(piece: Piece, file: BinaryIO, memory: Tensor, destination: Tensor, share: Share | None) -> bytes:
    """Read a piece into ``memory``, copy it, or what is this rank's of it, to its place; its hash."""
    view = tensor_bytes(memory)
    read_piece(file, piece, view)
    # To the device first: a copy that converts as well would convert on the host, in one thread.
    values = memory.view(piece.entry.dtype).to(destination.device)
    if share is None:
        destination.view(-1)[piece.start : piece.start + piece.count].copy_(values)
    else:
        share.copy(values, piece.start, destination)
    return hashlib.blake2b(view, digest_size=DIGEST_BYTES).digest()


def _match(
    folder: Path, entries: list[TensorEntry], destinations: dict[str, Tensor], spare: frozenset[str], shares: Shares
) -> list[TensorEntry]:
    """The entries that the model wants; each of the right shape, none missing, none unknown."""
    wanted = [entry for entry in entries if entry.name in destinations]
    for entry in entries:
        if entry.name not in destinations and entry.name not in spare:
            raise CheckpointError(entry.path, "is unexpected: the model of config.json has no such tensor", entry.name)
    for entry in wanted:
        expected = _whole_shape(entry.name, destinations[entry.name], shares)
        if entry.shape != expected:
            fault = f"has shape {list(entry.shape)}, config.json asks for {list(expected)}"
            raise CheckpointError(entry.path, fault, entry.name)
    for name in sorted(destinations.keys() - {entry.name for entry in wanted}):
        raise CheckpointError(entries[0].path if entries else folder, "is missing", name)
    return wanted


def _whole_shape(name: str, destination: Tensor, shares: Shares) -> tuple[int, ...]:
    """Of the checkpoint's tensor."""
    return shares[name].whole if name in shares else tuple(destination.shape)


def _digest(entry: TensorEntry, hashes: list[bytes]) -> bytes:
    digest = hashlib.blake2b(f"{entry.name}\0{entry.dtype}\0{entry.shape}\0".encode(), digest_size=DIGEST_BYTES)
    for piece in hashes:
        digest.update(piece)
    return digest.digest()
