"""One stream of plans for all ranks of a model: rank 0 says what comes next, the others follow.

What rank 0 sends is a plan, encoded once, or a *note*, bytes that are none of the workers' business. While it has
nothing else to say it says so, several times a second: who waits for it knows that it is there.
"""

from __future__ import annotations

import queue
import threading
from typing import Final

from penstock.executor.layers.parallel import Group
from penstock.executor.step import StepPlan, decode_plan, encode_plan

BEAT_S: Final = 0.25
_PLAN, _NOTE, _BEAT, _END = b"p", b"n", b"b", b"e"

Work = queue.SimpleQueue[StepPlan | bytes | None]
"""Plans and notes in order; None: the end."""


class Leader:
    """Rank 0's side."""

    def __init__(self, group: Group, work: Work) -> None:
        """``work`` is what it tells the others."""
        self._group, self._work = group, work

    def take(self) -> StepPlan | None:
        """Wait for the next plan and give it to all; None: the end. Raises GroupError."""
        while True:
            try:
                item = self._work.get(timeout=BEAT_S)
            except queue.Empty:
                self._group.send(_BEAT)
                continue
            if item is None:
                self._group.send(_END)
                return None
            if isinstance(item, StepPlan):
                self._group.send(_PLAN + encode_plan(item))
                return item
            self._group.send(_NOTE + item)


class Follower:
    """The side of any other rank."""

    def __init__(self, group: Group) -> None:
        """Nothing has come yet."""
        self._group = group
        self._leaving = threading.Event()
        self.notes: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        """Those that have come; None: there will be no more."""

    def take(self) -> StepPlan | None:
        """Wait for the next plan; None: rank 0 has ended, or this rank leaves. Raises GroupError."""
        try:
            while not self._leaving.is_set():
                message = self._group.receive()
                kind, content = message[:1], message[1:]
                if kind == _PLAN:
                    return decode_plan(content)
                if kind == _NOTE:
                    self.notes.put(content)
                elif kind == _END:
                    break
        except BaseException:
            self.notes.put(None)
            raise
        self.notes.put(None)
        return None

    def leave(self) -> None:
        """Follow no longer than to the next message."""
        self._leaving.set()
