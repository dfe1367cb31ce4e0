"""Ranks that are threads of one process and talk over gloo: quick to start, and easy to look into."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import pytest
from torch.distributed import HashStore, ProcessGroupGloo  # type: ignore[attr-defined]

from penstock.executor.layers.parallel import Backend, Group

T = TypeVar("T")


class Threads:
    """As many ranks as threads."""

    def __init__(self, size: int, seconds: float) -> None:
        store = HashStore()

        def join(rank: int) -> Group:
            gloo = ProcessGroupGloo(store, rank, size, timedelta(seconds=seconds))
            return Group(rank, size, {"cpu": cast(Backend, gloo)})

        self.size = size
        self.groups = self._all(join)

    def each(self, work: Callable[[Group], T]) -> list[T]:
        """What all ranks return at once."""
        return self._all(lambda rank: work(self.groups[rank]))

    def faults(self, work: Callable[[Group], object]) -> list[BaseException]:
        """What all ranks raise."""

        def failing(group: Group) -> BaseException:
            with pytest.raises(Exception) as caught:  # noqa: PT011  each test says of what kind
                work(group)
            return caught.value

        return self.each(failing)

    def _all(self, work: Callable[[int], T]) -> list[T]:
        made: dict[int, T] = {}

        def keep(rank: int) -> None:
            made[rank] = work(rank)

        threads = [threading.Thread(target=keep, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [made[rank] for rank in range(self.size)]


@contextmanager
def ranks(size: int, seconds: float = 30.0) -> Iterator[Threads]:
    threads = Threads(size, seconds)
    try:
        yield threads
    finally:
        for group in threads.groups:
            group.close()
