"""The executor whose worker is two threads of this process: for CPU, offline batches and tests.

Plans wait in a bounded queue and run strictly in order. With ``plans_in_flight`` 2 the next plan is there when one
ends, so that the device never waits for the planner. torch is loaded by :meth:`UniprocExecutor.start`, not by
importing this module.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.executor.executor import ExecutorError, Progress
from penstock.executor.step import ModelInfo, ModelSpec, StepPlan, StepResult

if TYPE_CHECKING:
    from penstock.executor.worker.runner import Runner

SHUTDOWN_SECONDS = 10.0


class UniprocExecutor:
    """See :class:`penstock.executor.executor.Executor`. One start, one shutdown."""

    def __init__(self) -> None:
        """Nothing is loaded and no thread runs."""
        self._ready = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: deque[StepResult] = deque()
        self._plans_in_flight = 0
        self._unanswered = 0
        self._failure: str | None = None
        self._threads: list[threading.Thread] = []
        self.runner: Runner | None = None
        """What the threads drive, once started: for measurements."""

    def start(self, spec: ModelSpec, progress: Progress) -> ModelInfo:
        """Load the model and start the thread."""
        from penstock.executor.worker.pipeline import Pipeline
        from penstock.executor.worker.worker import Worker

        if self.runner is not None:
            raise ExecutorError("the executor has been started before")
        worker = Worker.start(spec, progress)
        self.runner = worker.runner
        self._plans_in_flight = worker.info.plans_in_flight
        pipeline = Pipeline(worker.runner, self._plans.get, self._give, self._fail)
        self._threads = [
            threading.Thread(target=pipeline.launch_all, name="launch", daemon=True),
            threading.Thread(target=pipeline.collect_all, name="collect", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return worker.info

    def restart(self, progress: Progress) -> ModelInfo:
        """Its worker is not lost without this process."""
        raise ExecutorError("a worker inside this process cannot be started again")

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan."""
        self.check_health()
        if self._unanswered >= self._plans_in_flight:
            raise ExecutorError(f"plan {plan.number}: {self._unanswered} plans are in flight already")
        self._unanswered += 1
        self._plans.put(plan)

    def results(self) -> Sequence[StepResult]:
        """Take what is there; once all results before a failure are taken, raise it."""
        self._clear_ready()
        taken = [self._results.popleft() for _ in range(len(self._results))]
        self._unanswered -= len(taken)
        if self._failure is not None:
            os.eventfd_write(self._ready, 1)  # for good: there will always be something to raise
        if not taken:
            self._raise_failure()
        return taken

    def fileno(self) -> int:
        """An eventfd."""
        return self._ready

    def submit_mask(self, number: int, mask: bytes) -> None:
        """No plan waits for a mask here."""
        raise ExecutorError(f"plan {number} waits for no mask: this executor offers none")

    def load_adapter(self, path: str, first_row: int) -> int:
        """ModelInfo.adapter_rows is 0."""
        raise ExecutorError(f"{path}: this executor has no adapter rows")

    def check_health(self) -> None:
        """The thread runs and has not failed."""
        self._raise_failure()
        if not self._threads or not all(thread.is_alive() for thread in self._threads):
            raise ExecutorError("the worker's threads do not run")

    def shutdown(self) -> None:
        """Let the step that runs end, and end the threads. Raises ExecutorError if they do not end in time."""
        threads, self._threads = self._threads, []
        if threads:
            self._drop_plans()
            self._plans.put(None)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise ExecutorError(f"the worker's threads did not end within {SHUTDOWN_SECONDS:.0f} s")
        if self._ready >= 0:
            ready, self._ready = self._ready, -1
            os.close(ready)

    def _give(self, result: StepResult) -> None:
        self._results.append(result)
        os.eventfd_write(self._ready, 1)

    def _fail(self, failure: str) -> None:
        self._failure = failure
        os.eventfd_write(self._ready, 1)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise ExecutorError(self._failure)

    def _clear_ready(self) -> None:
        if self._ready < 0:
            raise ExecutorError("the executor has been shut down")
        try:
            os.eventfd_read(self._ready)
        except BlockingIOError:
            return

    def _drop_plans(self) -> None:
        while True:
            try:
                self._plans.get_nowait()
            except queue.Empty:
                return
