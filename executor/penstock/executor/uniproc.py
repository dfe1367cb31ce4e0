"""The executor whose worker is two threads of this process: for CPU, offline batches, torchrun and tests.

Plans wait in a bounded queue and run strictly in order. With ``plans_in_flight`` 2 the next plan is there when one
ends, so that the device never waits for the planner. torch is loaded by :meth:`UniprocExecutor.start`, not by
importing this module.

**Several ranks** (``ModelSpec.tensor_parallel``, the processes started by torchrun): each has this executor with its
share of the model. Rank 0's takes the plans and gives each one, encoded once, to the others, whose threads compute the
same steps; only rank 0 has results. A rank that ends or fails ends them all: there is no epoch after that.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from penstock.executor.executor import ExecutorError, Progress
from penstock.executor.step import ModelInfo, ModelSpec, StepPlan, StepResult

if TYPE_CHECKING:
    from penstock.executor.layers.parallel import Group
    from penstock.executor.worker.lockstep import Follower
    from penstock.executor.worker.pipeline import Pipeline
    from penstock.executor.worker.runner import Runner

SHUTDOWN_SECONDS = 10.0
_LOOK_S = 0.5


class UniprocExecutor:
    """See :class:`penstock.executor.executor.Executor`. One start, one shutdown."""

    def __init__(self) -> None:
        """Nothing is loaded and no thread runs."""
        self._ready = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._plans: queue.SimpleQueue[StepPlan | bytes | None] = queue.SimpleQueue()
        self._results: deque[StepResult] = deque()
        self._plans_in_flight = 0
        self._unanswered = 0
        self._heard_at = 0.0
        """When the newest result was taken, or the oldest plan that waits for one was submitted."""
        self._patience = float("inf")
        self._failure: str | None = None
        self._pipeline: Pipeline | None = None
        self._threads: list[threading.Thread] = []
        self._group: Group | None = None
        self._follower: Follower | None = None
        self.runner: Runner | None = None
        """What the threads drive, once started: for measurements."""

    def start(self, spec: ModelSpec, progress: Progress) -> ModelInfo:
        """Load the model and start the threads. With several ranks: in all of them, and none starts without the others.

        All of them return the same but for what the device is called and how much of its memory is taken.
        """
        from penstock.executor.worker.join import join_ranks
        from penstock.executor.worker.pipeline import Pipeline
        from penstock.executor.worker.worker import Worker

        if self.runner is not None:
            raise ExecutorError("the executor has been started before")
        self._group = group = join_ranks(spec)
        try:
            worker = Worker.start(spec, progress, group)
        except BaseException:
            group.close()
            raise
        self.runner = worker.runner
        self._plans_in_flight = worker.info.plans_in_flight
        if group.size > 1:
            self._patience = 2 * spec.rank_seconds  # whoever waits for a rank knows more, and gives up before
            atexit.register(self.shutdown)  # a thread that is inside gloo must not outlive the interpreter
        self._pipeline = pipeline = Pipeline(worker.runner, self._source(group), self._give, self._fail)
        self._threads = [
            threading.Thread(target=pipeline.launch_all, name="launch", daemon=True),
            threading.Thread(target=pipeline.collect_all, name="collect", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return worker.info

    def _source(self, group: Group) -> Callable[[], StepPlan | None]:
        """Where plans come from."""
        from penstock.executor.worker.lockstep import Follower, Leader

        if group.size == 1:
            return cast(Callable[[], StepPlan | None], self._plans.get)  # there is nobody to publish a note for
        if group.rank:
            self._follower = Follower(group)
            return self._follower.take
        return Leader(group, self._plans).take

    def restart(self, progress: Progress) -> ModelInfo:
        """Its worker is not lost without this process, nor a rank without all of them."""
        raise ExecutorError("a worker inside this process cannot be started again")

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan."""
        self.check_health()
        if self.rank:
            raise ExecutorError(f"plan {plan.number}: rank {self.rank} follows rank 0, which alone takes plans")
        if self._unanswered >= self._plans_in_flight:
            raise ExecutorError(f"plan {plan.number}: {self._unanswered} plans are in flight already")
        if not self._unanswered:
            self._heard_at = time.monotonic()
        self._unanswered += 1
        self._plans.put(plan)

    def results(self) -> Sequence[StepResult]:
        """Take what is there; once all results before a failure are taken, raise it."""
        self._clear_ready()
        taken = [self._results.popleft() for _ in range(len(self._results))]
        self._unanswered -= len(taken)
        if taken:
            self._heard_at = time.monotonic()
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
        """The threads run, have not failed, and with several ranks answer in time."""
        self._raise_failure()
        if not self._threads or not all(thread.is_alive() for thread in self._threads):
            # What was launched on a GPU when a rank was lost never ends, so that nobody has told of the failure yet.
            failure = self._pipeline.failure if self._pipeline is not None else None
            raise ExecutorError(failure or "the worker's threads do not run")
        if self._unanswered and time.monotonic() - self._heard_at > self._patience:
            raise ExecutorError(f"the ranks answered nothing for {self._patience:.0f} s")

    def shutdown(self) -> None:
        """Let the step that runs end, and end the threads. Raises ExecutorError if they do not end in time.

        Rank 0 ends the others' threads, too; another rank parts from the group, and rank 0 fails if it goes on.
        """
        threads, self._threads = self._threads, []
        if self._group is not None and self._pipeline is not None and self._pipeline.failure is not None:
            self._group.close()  # ends what waits on a GPU for a rank that is lost
        if self._follower is not None:
            self._follower.leave()
        elif threads:
            self._drop_plans()
            self._plans.put(None)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise ExecutorError(f"the worker's threads did not end within {SHUTDOWN_SECONDS:.0f} s")
        if self._group is not None:
            self._group.close()
            atexit.unregister(self.shutdown)
        if self._ready >= 0:
            ready, self._ready = self._ready, -1
            os.close(ready)

    # ---- ranks ----

    @property
    def rank(self) -> int:
        """This process among those that share the model; 0 takes the plans."""
        return 0 if self._group is None else self._group.rank

    @property
    def ranks(self) -> int:
        """How many there are; 1 before the start."""
        return 1 if self._group is None else self._group.size

    def publish(self, note: bytes) -> None:
        """Rank 0: give ``note`` to all other ranks, behind the plans submitted so far."""
        self._plans.put(note)

    def await_note(self) -> bytes:
        """Any other rank: the next note of rank 0. Waits as long as rank 0 is there; raises ExecutorError if not."""
        if self._follower is None:
            raise ExecutorError("rank 0 waits for no notes, it publishes them")
        if self._ready < 0:
            raise ExecutorError("the executor has been shut down")
        while True:
            try:
                note = self._follower.notes.get(timeout=_LOOK_S)
            except queue.Empty:
                self.check_health()
                continue
            if note is None:
                self._follower.notes.put(None)  # for good
                self._raise_failure()
                raise ExecutorError("rank 0 has ended")
            return note

    # ---- the threads' side ----

    def _give(self, result: StepResult) -> None:
        if self.rank:
            return  # rank 0 has the same, and somebody who asks for it
        self._results.append(result)
        os.eventfd_write(self._ready, 1)

    def _fail(self, failure: str) -> None:
        self._failure = failure
        if self._group is not None:
            self._group.close()  # the others learn of it now, and not at their deadline
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
        """Notes are kept: somebody waits for them."""
        notes: list[bytes] = []
        while True:
            try:
                item = self._plans.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, bytes):
                notes.append(item)
        for note in notes:
            self._plans.put(note)
