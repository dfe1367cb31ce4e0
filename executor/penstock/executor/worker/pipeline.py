"""Two threads around a runner: one launches plans, the other collects what they made.

So a plan is launched while the one before it still runs, and neither waits for the other's Python.
"""

from __future__ import annotations

import queue
from collections.abc import Callable

from penstock.executor.models.errors import one_line
from penstock.executor.step import StepPlan, StepResult
from penstock.executor.worker.runner import Runner


class Pipeline:
    """Plans in, results out, in order, until there are no more or one fails."""

    def __init__(
        self,
        runner: Runner,
        take: Callable[[], StepPlan | None],
        give: Callable[[StepResult], None],
        fail: Callable[[str], None],
    ) -> None:
        """``take`` waits for the next plan, None: no more. ``fail`` is called once, behind all results, if at all."""
        self._runner, self._take, self._give, self._fail = runner, take, give, fail
        self._launched: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._failure: str | None = None

    @property
    def failed(self) -> bool:
        """Whether no more results will come."""
        return self._failure is not None

    def launch_all(self) -> None:
        """The launching thread's work."""
        self._runner.take_thread()
        try:
            while (plan := self._take()) is not None and not self.failed:
                try:
                    self._runner.launch(plan)
                except Exception as error:  # noqa: BLE001  whatever it was must be reported
                    self._failure = f"plan {plan.number} failed: {one_line(error)}"
                    return
                self._launched.put(plan.number)
        finally:
            self._launched.put(None)

    def collect_all(self) -> None:
        """The collecting thread's work; it ends behind the last result."""
        self._runner.take_thread()
        while (number := self._launched.get()) is not None:
            try:
                self._give(self._runner.collect())
            except Exception as error:  # noqa: BLE001  whatever it was must be reported
                self._failure = f"plan {number} failed: {one_line(error)}"
                break
        if self._failure is not None:
            self._fail(self._failure)
