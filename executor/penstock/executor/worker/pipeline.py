"""Two threads around a runner: one launches plans, the other collects what they made.

So a plan is launched while the one before it still runs, and neither waits for the other's Python.
"""

from __future__ import annotations

import queue
from collections.abc import Callable

from penstock.executor.executor import ExecutorError
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
        self.failure: str | None = None
        """Why no more results will come; known before ``fail`` is called, which waits for the results that will."""

    def launch_all(self) -> None:
        """The launching thread's work."""
        self._runner.take_thread()
        try:
            while (plan := self._next()) is not None and self.failure is None:
                try:
                    self._runner.launch(plan)
                except Exception as error:  # noqa: BLE001  whatever it was must be reported
                    self.failure = f"plan {plan.number} failed: {one_line(error)}"
                    return
                self._launched.put(plan.number)
        finally:
            self._launched.put(None)

    def _next(self) -> StepPlan | None:
        """The next plan; None: no more, or nobody knows what comes next."""
        try:
            return self._take()
        except ExecutorError as error:
            self.failure = str(error)
            return None

    def collect_all(self) -> None:
        """The collecting thread's work; it ends behind the last result."""
        self._runner.take_thread()
        while (number := self._launched.get()) is not None:
            try:
                self._give(self._runner.collect())
            except Exception as error:  # noqa: BLE001  whatever it was must be reported
                self.failure = f"plan {number} failed: {one_line(error)}"
                break
        if self.failure is not None:
            self._fail(self.failure)
