"""A ring of bytes in shared memory: one writer, N readers, each message goes to every reader.

A message is a u32 length and its bytes, padded to eight. Positions are byte counts that only grow, stored as aligned
64-bit words: a plain store of one is seen whole, and on x86-64 stores are seen in order, so that who sees the position
sees the bytes before it. Elsewhere a lock and the wake-up call, a system call, are the fences.

A reader that finds nothing says that it sleeps, *looks again*, and only then waits on its eventfd; a writer that finds
a sleeper after it has moved the position wakes it. Each side stores one word and then loads the other's, which even
x86-64 may reorder: a lock of its own, taken and given back in between, is the fence. So no wake-up is lost, a busy
reader costs the writer nothing, and an idle one burns nothing.
"""

import contextlib
import mmap
import os
import select
import struct
import threading
from typing import Final

_HEADER: Final = 64
_READER: Final = 64
_LENGTH: Final = struct.Struct("=I")
_SKIP: Final = 0xFFFFFFFF

_HEAD: Final = 0
_CAPACITY: Final = 1
_TAIL: Final = 0
_SLEEPS: Final = 1


class RingHandle:
    """The descriptors of a ring, to be passed to another process (``pass_fds``) and opened there."""

    __slots__ = ("eventfds", "memfd")

    def __init__(self, memfd: int, eventfds: tuple[int, ...]) -> None:
        self.memfd = memfd
        self.eventfds = eventfds

    def fds(self) -> tuple[int, ...]:
        """All descriptors."""
        return (self.memfd, *self.eventfds)

    def encode(self) -> str:
        """As an argument of a command line."""
        return ",".join(str(fd) for fd in self.fds())

    @classmethod
    def decode(cls, text: str) -> "RingHandle":
        """From an argument of a command line. Raises ValueError."""
        memfd, *eventfds = (int(part) for part in text.split(","))
        return cls(memfd, tuple(eventfds))

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.fds():
            os.close(fd)


def create_ring(capacity: int, readers: int = 1) -> RingHandle:
    """Create a ring of ``capacity`` bytes, rounded up to whole pages, for that many readers."""
    capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
    memfd = os.memfd_create("penstock-ring")
    os.ftruncate(memfd, _HEADER + readers * _READER + capacity)
    eventfds = tuple(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(readers))
    handle = RingHandle(memfd, eventfds)
    _Mapping(handle).words[_CAPACITY] = capacity
    return handle


class _Mapping:
    """The shared memory of a ring as words and bytes."""

    def __init__(self, handle: RingHandle) -> None:
        self.memory = mmap.mmap(handle.memfd, 0)
        self.start = _HEADER + len(handle.eventfds) * _READER
        self.view = memoryview(self.memory)
        self.words = self.view[:_HEADER].cast("Q")
        self.data = self.view[self.start :]
        self.readers = [
            self.view[_HEADER + i * _READER : _HEADER + (i + 1) * _READER].cast("Q")
            for i in range(len(handle.eventfds))
        ]

    def close(self) -> None:
        """Unmap."""
        for view in (self.words, self.data, *self.readers, self.view):
            view.release()
        self.memory.close()


class RingWriter:
    """The writing end. One process and one thread has it."""

    def __init__(self, handle: RingHandle) -> None:
        self._eventfds = handle.eventfds
        self._mapping = _Mapping(handle)
        self._words = self._mapping.words
        self._readers = self._mapping.readers
        self._data = self._mapping.data
        self._capacity = self._words[_CAPACITY]
        self._head = self._words[_HEAD]
        self._fence = threading.Lock()

    @property
    def max_message(self) -> int:
        """Most bytes of one message: a quarter of the ring, so that a large one never waits for an empty ring."""
        return self._capacity // 4

    def put(self, message: bytes) -> bool:
        """Write a message and wake who sleeps. False if there is no room now.

        Raises ValueError if it is larger than max_message.
        """
        size = len(message)
        if size > self.max_message:
            raise ValueError(f"a message of {size} bytes, more than the ring's {self.max_message}")
        needed = 4 + size + (-(4 + size) & 7)
        at = self._head % self._capacity
        skip = self._capacity - at if at + needed > self._capacity else 0
        if self._head + skip + needed - min(reader[_TAIL] for reader in self._readers) > self._capacity:
            return False
        if skip:
            _LENGTH.pack_into(self._data, at, _SKIP)
            at = 0
        _LENGTH.pack_into(self._data, at, size)
        self._data[at + 4 : at + 4 + size] = message
        self._head += skip + needed
        self._words[_HEAD] = self._head
        with self._fence:
            pass
        self._wake()
        return True

    def _wake(self) -> None:
        for reader, eventfd in zip(self._readers, self._eventfds, strict=True):
            if reader[_SLEEPS]:
                reader[_SLEEPS] = 0
                os.eventfd_write(eventfd, 1)

    def free_bytes(self) -> int:
        """Room for messages now."""
        return int(self._capacity - (self._head - min(reader[_TAIL] for reader in self._readers)))

    def close(self) -> None:
        """Unmap; the descriptors stay open."""
        self._mapping.close()


class RingReader:
    """A reading end. One process and one thread has it."""

    def __init__(self, handle: RingHandle, index: int = 0) -> None:
        self._eventfd = handle.eventfds[index]
        self._mapping = _Mapping(handle)
        self._words = self._mapping.words
        self._reader = self._mapping.readers[index]
        self._data = self._mapping.data
        self._capacity = self._words[_CAPACITY]
        self._tail = self._reader[_TAIL]
        self._fence = threading.Lock()

    def get(self) -> bytes | None:
        """Take the next message, or None if there is none; never waits."""
        if self._words[_HEAD] == self._tail:
            return None
        at = self._tail % self._capacity
        (size,) = _LENGTH.unpack_from(self._data, at)
        if size == _SKIP:
            self._tail += self._capacity - at
            at = 0
            (size,) = _LENGTH.unpack_from(self._data, 0)
        message = bytes(self._data[at + 4 : at + 4 + size])
        self._tail += 4 + size + (-(4 + size) & 7)
        self._reader[_TAIL] = self._tail
        return message

    def fileno(self) -> int:
        """The eventfd: readable after a wake-up that prepare_sleep asked for."""
        return self._eventfd

    def prepare_sleep(self) -> bool:
        """Ask to be woken by the next message. False if there is one already: then do not sleep."""
        self._reader[_SLEEPS] = 1
        with self._fence:
            pass
        if self._words[_HEAD] != self._tail:
            self.end_sleep()
            return False
        return True

    def end_sleep(self) -> None:
        """Take back prepare_sleep, and the wake-up if there was one."""
        self._reader[_SLEEPS] = 0
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)

    def wait(self, timeout_s: float) -> bytes | None:
        """The next message, waiting for it at most that long; None if none came."""
        message = self.get()
        if message is None and self.prepare_sleep():
            select.select([self._eventfd], [], [], timeout_s)
            self.end_sleep()
        return message if message is not None else self.get()

    def close(self) -> None:
        """Unmap; the descriptors stay open."""
        self._mapping.close()
