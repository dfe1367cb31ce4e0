"""Ranks that compute one model together: what they add up, agree on and tell each other.

Tensor parallelism (Shoeybi et al. 2019, "Megatron-LM"): each rank holds some heads of every attention and a share of
every feed-forward block, and two sums over the ranks a layer make their outputs whole. A :class:`Group` of one rank
does nothing and costs nothing.

Every operation is made by all ranks in the same order, by one thread of each, and ends within the group's deadline.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

from penstock.executor.executor import ExecutorError
from penstock.executor.models.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from torch.distributed import AllreduceOptions, BroadcastOptions

FRAME_BYTES: Final = 4096
"""Messages up to this size, their length included, take one broadcast: most plans do."""
ABORT_SECONDS: Final = 30.0
"""That an abort may take; whoever closes goes on then."""
_LENGTH_BYTES: Final = 8
_SOURCE_FILE: Final = re.compile(r"^\[[^\]]*\] ")
"""What the transport puts in front of its messages: the line of its own code."""


class GroupError(ExecutorError):
    """Another rank is lost, or was silent for too long. The group cannot be used any more."""


class Work(Protocol):
    """An operation that has begun."""

    def wait(self) -> object:
        """Until it has ended; on a GPU later work of the current stream waits instead. Raises RuntimeError."""
        ...


class Backend(Protocol):
    """One of torch.distributed's, for one kind of device: gloo or NCCL."""

    def allreduce(self, tensors: list[Tensor], options: AllreduceOptions) -> Work | None: ...

    def broadcast(self, tensors: list[Tensor], options: BroadcastOptions) -> Work | None: ...

    def abort(self) -> None:
        """End what waits for other ranks, on the device too."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """All ranks of one model, seen from one of them. Operations raise :class:`GroupError`."""

    rank: int = 0
    size: int = 1
    backends: dict[str, Backend] = field(default_factory=dict)
    """By the type of the device that a tensor is on; "cpu" is always there if ``size`` is more than 1."""
    _drops: list[Callable[[], None]] = field(default_factory=list)
    """See :meth:`before_close`."""

    # ---- tensors ----

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor``, contiguous and of the same shape in all ranks, by its sum over them; returns it.

        On a GPU nothing waits for the device, and it can be captured in a CUDA graph.
        """
        if self.size > 1 and tensor.numel():
            from torch.distributed import AllreduceOptions

            options = AllreduceOptions()
            options.asyncOp = False
            with self._errors():
                _wait(self._backend(tensor).allreduce([tensor], options))
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Replace ``tensor``, contiguous, by that of rank ``source``; returns it. Else as :meth:`all_reduce`."""
        if self.size > 1 and tensor.numel():
            from torch.distributed import BroadcastOptions

            options = BroadcastOptions()
            options.rootRank, options.asyncOp = source, False
            with self._errors():
                _wait(self._backend(tensor).broadcast([tensor], options))
        return tensor

    # ---- bytes ----

    def send(self, data: bytes) -> None:
        """Rank 0: give ``data`` to all other ranks, which :meth:`receive` it."""
        self._frames(data, 0)

    def receive(self) -> bytes:
        """What rank 0 sends."""
        return self._frames(b"", 0)

    def exchange(self, data: bytes) -> list[bytes]:
        """The ``data`` of all ranks, by rank."""
        return [self._frames(data, source) for source in range(self.size)]

    def _frames(self, data: bytes, source: int) -> bytes:
        """Broadcast the ``data`` of rank ``source``: a frame with its length and its beginning, then the rest."""
        if self.size == 1:
            return data
        message = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        frame = self._told(message[:FRAME_BYTES], FRAME_BYTES, source)
        length = int.from_bytes(frame[:_LENGTH_BYTES], "little")
        rest = length + _LENGTH_BYTES - FRAME_BYTES
        if rest > 0:
            frame += self._told(message[FRAME_BYTES:], rest, source)
        return frame[_LENGTH_BYTES : _LENGTH_BYTES + length]

    def _told(self, data: bytes, size: int, source: int) -> bytes:
        frame = torch.zeros(size, dtype=torch.uint8)
        if self.rank == source:
            frame[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self.broadcast(frame, source).numpy().tobytes()

    # ---- agreement ----

    @contextmanager
    def together(self) -> Iterator[None]:
        """Either every rank gets past what is inside, or none does: no rank waits for one that has given up.

        Whatever one rank raises inside, the others raise as ExecutorError that names the rank. What is inside uses no
        operation of the group that the fault of a single rank could skip.
        """
        try:
            yield
        except Exception as error:
            self._tell(error)
            raise
        for rank, fault in enumerate(self.exchange(b"") if self.size > 1 else ()):
            if fault:
                raise ExecutorError(f"rank {rank}: {fault.decode()}")

    def _tell(self, error: Exception) -> None:
        if self.size > 1 and not isinstance(error, GroupError):
            line = str(error) if isinstance(error, ExecutorError | CheckpointError) else one_line(error)
            with suppress(GroupError):  # the first fault is the one to tell
                self.exchange(line.encode())

    def least(self, number: int) -> int:
        """The smallest ``number`` of all ranks."""
        return min(int(data) for data in self.exchange(str(number).encode()))

    def require_same(self, what: str, value: str) -> None:
        """Raise ExecutorError, in every rank, if the ranks do not have the same ``value``."""
        values = [data.decode() for data in self.exchange(value.encode())]
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ExecutorError(f"{what} is {values[0]} in rank 0 and {other} in rank {rank}")

    # ---- end ----

    def before_close(self, drop: Callable[[], None]) -> None:
        """Have ``drop`` called, by any thread, to let go of the CUDA graphs that captured operations of the group."""
        if self.size > 1:
            self._drops.append(drop)

    def close(self) -> None:
        """Part from the others: whatever they wait for fails at once. Idempotent.

        Nothing of this rank may be going on but what waits for a rank that is lost.
        """
        nccl = self.backends.get("cuda")
        self.backends.clear()  # gloo parts when nobody holds it any more
        if nccl is None:
            return
        # What waits on the GPU for a rank that is lost would wait for good. It ends when this begins; this ends when
        # there are no graphs any more that captured an operation (NCCL 2.28, init.cc, commDestroySync).
        ending = threading.Thread(target=nccl.abort, name="abort", daemon=True)
        ending.start()
        for drop in self._drops:
            drop()
        ending.join(ABORT_SECONDS)

    def _backend(self, tensor: Tensor) -> Backend:
        backend = self.backends.get(tensor.device.type)
        if backend is None:
            gone = "has been closed" if not self.backends else f"has no way for tensors on {tensor.device.type}"
            raise GroupError(f"the group of {self.size} ranks {gone}")
        return backend

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            line = _SOURCE_FILE.sub("", str(error).splitlines()[0]).split(". This is typically")[0]
            raise GroupError(f"another rank of {self.size} is lost or does not answer: {line}") from error


def _wait(work: Work | None) -> None:
    if work is not None:  # None: ordered behind the current stream already
        work.wait()


ALONE: Final = Group()
"""The group of a model that one process computes."""
