"""The executor whose worker is a process of its own, so that a dead GPU process is a restart and not the end.

Plans go to the worker through one byte ring, results come back through another; this side loads no torch. A worker that
ends, fails or does not answer a plan in time is *lost*: it is killed, and :meth:`MultiprocessExecutor.restart` starts
another one with rings of its own, so that nothing of the old one can come later.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.executor.executor import ExecutorError, Progress, WorkerLost
from penstock.executor.ring import RingHandle, RingReader, RingWriter, create_ring
from penstock.executor.step import ModelInfo, ModelSpec, StepPlan, StepResult, decode_result, encode_plan
from penstock.executor.timer import TimerFd
from penstock.executor.worker.arguments import END, FAILED, PROGRESS, READY, RESULT, Stage, WorkerArguments

PLAN_RING_BYTES: Final = 64 * 2**20
"""Memory is taken only where messages were; the largest plan may have a quarter: the ids of 250 fragments."""
RESULT_RING_BYTES: Final = 16 * 2**20
FIRST_STEP_S: Final = 300.0
"""For the first result of a worker: kernels may have to be compiled."""
START_SILENCE_S: Final = 600.0
"""For each word of a worker that starts: profiling and tuning report no progress."""
RESTART_SHARE: Final = 0.02
"""Of a GPU's memory: by how much what is in use may differ from one start to the next."""
SHUTDOWN_S: Final = 10.0
_LOOK_S: Final = 0.2


class WorkerProcess:
    """One worker process and the executor's ends of its rings."""

    def __init__(self, spec: ModelSpec, log_level: str) -> None:
        """Start it. Raises OSError."""
        self._rings: tuple[RingHandle, RingHandle] = (create_ring(PLAN_RING_BYTES), create_ring(RESULT_RING_BYTES))
        plans, results = self._rings
        self.plans, self.results = RingWriter(plans), RingReader(results)
        arguments = WorkerArguments(
            spec=spec,
            plans=plans.encode(),
            results=results.encode(),
            parent_pid=os.getpid(),
            log_level=log_level,
        )
        self.process = subprocess.Popen(arguments.argv(), pass_fds=arguments.fds(), stdin=subprocess.DEVNULL)
        self.pidfd = os.pidfd_open(self.process.pid)

    @property
    def ended(self) -> str | None:
        """How it ended; None: it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def close(self) -> None:
        """Kill it if need be, and close all descriptors."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(SHUTDOWN_S)
        os.close(self.pidfd)
        self.plans.close()
        self.results.close()
        for ring in self._rings:
            ring.close()


class MultiprocessExecutor:
    """See :class:`penstock.executor.executor.Executor`. One start, one shutdown, restarts between them."""

    def __init__(self, *, step_seconds: float = 30.0, log_level: str = "info") -> None:
        """``step_seconds``: a worker that leaves a plan unanswered for so long is lost."""
        self._step_seconds, self._log_level = step_seconds, log_level
        self._spec: ModelSpec | None = None
        self._worker: WorkerProcess | None = None
        self._ready = select.epoll()
        self._timer = TimerFd()
        self._ready.register(self._timer.fileno(), select.EPOLLIN)
        self._taken: deque[StepResult] = deque()
        self._lost: str | None = None
        self._unanswered = 0
        self._answered = False
        """Whether this worker has given a result."""
        self._deadline_ns = 0
        self._plans_in_flight = 0

    # ---- start and end ----

    def start(self, spec: ModelSpec, progress: Progress) -> ModelInfo:
        """Start the worker and wait until it has loaded the model."""
        if self._spec is not None:
            raise ExecutorError("the executor has been started before")
        if spec.tensor_parallel > 1:
            raise ExecutorError(f"tensor_parallel {spec.tensor_parallel}: only the uniproc executor offers it")
        self._spec = spec
        info = self._start(progress)
        if spec.kv_cache_bytes is None:  # the next worker must offer as much, although it may find less memory
            share = min(1.0, spec.gpu_memory_utilization + RESTART_SHARE)
            self._spec = msgspec.structs.replace(spec, num_blocks=info.num_blocks, gpu_memory_utilization=share)
        return info

    def restart(self, progress: Progress) -> ModelInfo:
        """Start another worker in place of the one that is lost. Raises WorkerLost if it does not start either."""
        if self._spec is None:
            raise ExecutorError("the executor has not been started")
        self._close_worker()
        try:
            return self._start(progress)
        except ExecutorError as error:
            raise WorkerLost(str(error)) from error

    def _start(self, progress: Progress) -> ModelInfo:
        assert self._spec is not None
        self._worker = worker = WorkerProcess(self._spec, self._log_level)
        self._lost, self._unanswered, self._answered = None, 0, False
        self._taken.clear()
        self._set_deadline()
        info = _await_ready(worker, progress)
        self._plans_in_flight = info.plans_in_flight
        for fd in (worker.results.fileno(), worker.pidfd):
            self._ready.register(fd, select.EPOLLIN)
        worker.results.prepare_sleep()
        return info

    def shutdown(self) -> None:
        """Ask the worker to end, and kill it if it does not."""
        worker = self._worker
        if worker is not None:
            if worker.ended is None and worker.plans.put(END):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(SHUTDOWN_S / 2)
            self._close_worker()
        if not self._ready.closed:
            self._ready.close()
            self._timer.close()

    def _close_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            for fd in (worker.results.fileno(), worker.pidfd):
                with contextlib.suppress(FileNotFoundError):  # it never was ready
                    self._ready.unregister(fd)
            worker.close()

    # ---- plans and results ----

    def submit(self, plan: StepPlan) -> None:
        """Put the plan into the ring."""
        self.check_health()
        if self._unanswered >= self._plans_in_flight:
            raise ExecutorError(f"plan {plan.number}: {self._unanswered} plans are in flight already")
        assert self._worker is not None
        try:
            sent = self._worker.plans.put(encode_plan(plan))
        except ValueError as error:
            raise ExecutorError(f"plan {plan.number}: {error}") from error
        if not sent:
            self._lose("takes no plans")
        self._unanswered += 1
        if self._unanswered == 1:
            self._set_deadline()

    def results(self) -> Sequence[StepResult]:
        """Take what is there; once all results before a loss are taken, raise it."""
        worker = self._running()
        if self._lost is None:
            self._look(worker)
        taken = list(self._taken)
        self._taken.clear()
        if taken:
            self._unanswered -= len(taken)
            self._answered = True
            self._set_deadline()
        elif self._lost is not None:
            raise WorkerLost(self._lost)
        return taken

    def _look(self, worker: WorkerProcess) -> None:
        """Take in what the worker has sent, and find out whether it is lost."""
        ended = worker.ended  # asked first: what it sent before its end is in the ring
        worker.results.end_sleep()
        while True:
            message = worker.results.get()
            if message is None:
                if worker.results.prepare_sleep():
                    break
            elif message[:1] == RESULT:
                self._taken.append(decode_result(message[1:]))
            elif message[:1] == FAILED:
                self._lost = f"the worker failed: {message[1:].decode()}"
                return
        if ended is not None:
            self._lost = f"the worker {ended}"
        elif not self._taken and self._deadline_ns and time.monotonic_ns() >= self._deadline_ns:
            self._lost = f"the worker answered nothing for {self._patience:.0f} s"
            worker.process.kill()

    def fileno(self) -> int:
        """An epoll descriptor: results, the worker's end, its deadline."""
        return self._ready.fileno()

    def check_health(self) -> None:
        """Raise WorkerLost if the worker is known to be lost."""
        self._running()
        if self._lost is not None:
            raise WorkerLost(self._lost)

    def submit_mask(self, number: int, mask: bytes) -> None:
        """No plan waits for a mask here."""
        raise ExecutorError(f"plan {number} waits for no mask: this executor offers none")

    def load_adapter(self, path: str, first_row: int) -> int:
        """ModelInfo.adapter_rows is 0."""
        raise ExecutorError(f"{path}: this executor has no adapter rows")

    # ---- loss ----

    def _running(self) -> WorkerProcess:
        if self._worker is None:
            raise ExecutorError("the executor does not run")
        return self._worker

    def _lose(self, why: str) -> None:
        self._lost = f"the worker {why}"
        raise WorkerLost(self._lost)

    @property
    def _patience(self) -> float:
        return self._step_seconds if self._answered else max(FIRST_STEP_S, self._step_seconds)

    def _set_deadline(self) -> None:
        """For the oldest plan that is not answered; none if there is none."""
        self._deadline_ns = time.monotonic_ns() + int(self._patience * 1e9) if self._unanswered else 0
        self._timer.set(self._deadline_ns)


def _await_ready(worker: WorkerProcess, progress: Progress) -> ModelInfo:
    """Pass on the worker's progress until it is ready. Raises ExecutorError if it cannot be, or says nothing."""
    give_up = time.monotonic() + START_SILENCE_S
    while True:
        ended = worker.ended
        message = worker.results.wait(_LOOK_S)
        if message is None:
            if ended is not None:
                raise ExecutorError(f"the worker {ended} while it started")
            if time.monotonic() >= give_up:
                raise ExecutorError(f"the worker said nothing for {START_SILENCE_S:.0f} s while it started")
        elif message[:1] == PROGRESS:
            give_up = time.monotonic() + START_SILENCE_S
            stage = msgspec.msgpack.decode(message[1:], type=Stage)
            progress(stage.name, stage.done, stage.total)
        elif message[:1] == READY:
            return msgspec.msgpack.decode(message[1:], type=ModelInfo)
        elif message[:1] == FAILED:
            raise ExecutorError(message[1:].decode())
