"""The engine's loop: commands in, plans out, results in, records out.

Each turn: beat · take commands · absorb results · send records · plan if it is time · sleep until something happens.

**Late submission.** While a step runs, the next plan is made as late as it can be: at the step's predicted end minus a
lead. So every plan contains whatever arrived before it, and a request waits for at most one step and a lead. What is
predicted counts from the moment when the step really began, the result before it, so that errors do not add up.

**One poisonous request fails alone**: what the core does not take, whatever it raises, ends as FAILED.

**A lost worker is an epoch, not the end**: while another one starts, the state is RECOVERING, requests are taken,
deadlines run; then everything is computed again that was on the device.

**Bursts**: a step far shorter than the host's own work is planned several times over, up to 2 ms of device time in all.

Nothing here blocks but the sleep, which ends after 50 ms at the latest; no record that the gate's ring does not take is
lost, and while there are any no plan is made.
"""

import select
import time
from collections import deque
from typing import Final

from penstock.executor.executor import Executor, Progress, WorkerLost
from penstock.executor.ring import RingReader, RingWriter
from penstock.executor.step import ModelInfo, unpack_u32
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.engine.recovery import Recovery
from penstock.scheduler.engine.timing import StepTimes
from penstock.scheduler.records import commands, events
from penstock.scheduler.records.vitals import EngineState, Vitals
from penstock.telemetry.logging import get_logger

_TURN_S: Final = 0.05
_LOAD_NS: Final = 100_000_000
_COMMANDS_A_TURN: Final = 256
_BURST_NS: Final = 2_000_000
"""Device time of a burst: what an arrival may have to wait for it."""

log = get_logger(__name__)


class Loop:
    """One engine: a core, an executor and two rings."""

    def __init__(
        self,
        info: ModelInfo,
        executor: Executor,
        commands_ring: RingReader,
        events_ring: RingWriter,
        vitals: Vitals,
        *,
        traced_step_every: int = 16,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        self._info = info
        self._executor = executor
        self._commands = commands_ring
        self._events = events_ring
        self._vitals = vitals
        self.core = Core(info, FirstComeFirstServed(), traced_step_every=traced_step_every)
        self._recovery = Recovery(executor, info)
        self._progress = progress
        self._draining = False
        self._times = StepTimes()
        self._backlog: deque[bytes] = deque()
        self._running = True
        self._next_load = 0
        self._steps = 0
        self._began = 0
        """When the oldest plan in flight began to run."""
        self._last_result = 0
        self._shapes: deque[tuple[tuple[int, int], int, int]] = deque()
        """Of each plan in flight its shape, its steps, and the host's time for it."""
        self._last_shape = (0, 0)

    def run(self) -> None:
        """Until a Shutdown command. Raises ExecutorError if the executor fails for good."""
        while self._running:
            try:
                self.turn()
            except WorkerLost as lost:
                self._recover(lost)

    def turn(self) -> None:
        """One turn."""
        self._vitals.beat()
        self._take_commands()
        now = time.monotonic_ns()
        self._absorb(now)
        self.core.expire(now)
        self._send_output()
        self._send_load(now)
        wait_ns = self._plan_if_due()
        if wait_ns > 0:
            self._sleep(wait_ns / 1e9)

    def _recover(self, lost: WorkerLost) -> None:
        """Begin a new epoch with another worker."""
        self._vitals.set_state(EngineState.RECOVERING)
        self.core.lose_epoch(time.monotonic_ns())
        self._shapes.clear()
        self._last_result = 0
        self._recovery.restart(lost, self._idle_turn, self._progress)
        self._vitals.set_state(EngineState.DRAINING if self._draining else EngineState.SERVING)

    def _idle_turn(self) -> None:
        """A turn without a device."""
        self._vitals.beat()
        self._take_commands()
        now = time.monotonic_ns()
        self.core.expire(now)
        self._send_output()
        self._send_load(now)

    # ---- in ----

    def _take_commands(self) -> None:
        for _ in range(_COMMANDS_A_TURN):
            data = self._commands.get()
            if data is None:
                return
            self._obey(commands.decode(data))

    def _obey(self, command: commands.Command) -> None:
        match command:
            case commands.Submit():
                self._submit(command)
            case commands.Cancel(handles):
                now = time.monotonic_ns()
                for handle in unpack_u32(handles):
                    self.core.cancel(handle, now)
            case commands.Drain():
                self._draining = True
                self._vitals.set_state(EngineState.DRAINING)
            case commands.Shutdown():
                self._running = False

    def _submit(self, request: commands.Submit) -> None:
        try:
            self.core.submit(request)
        except Exception as error:  # whatever it is: the loop and all others go on
            log.error("engine.bad_request", exc_info=error)
            self.core.refuse(request, f"the engine cannot take it: {error}", time.monotonic_ns())

    def _absorb(self, now: int) -> None:
        for result in self._executor.results():
            flight = self.core.absorb(result, now)
            if flight is None:
                continue
            shape, repeat, host_ns = self._shapes.popleft()
            self._times.observe(shape, result.device_ns // repeat, host_ns + result.host_ns)
            if self._last_result:
                self._times.observe_period(now - self._last_result)
            self._last_result = now if self.core.in_flight else 0
            self._began = now
            self._steps += 1

    # ---- out ----

    def _send_output(self) -> None:
        record = self.core.take_output()
        if record is not None:
            self._send(record)
        while self._backlog and self._events.put(self._backlog[0]):
            self._backlog.popleft()

    def _send(self, event: events.Event) -> None:
        data = events.encode(event)
        if self._backlog or not self._events.put(data):
            self._backlog.append(data)

    def _send_load(self, now: int) -> None:
        if now >= self._next_load and not self._backlog:
            self._next_load = now + _LOAD_NS
            load = self.core.load(now, self._steps, int(self._times.period_ns // 1000))
            self._send(events.LoadReport(load))

    # ---- plan ----

    def _plan_if_due(self) -> int:
        """Make and submit the next plan if it is time; returns for how long there is nothing to do, in ns."""
        core = self.core
        idle = int(_TURN_S * 1e9)
        if self._backlog or not core.has_work or core.in_flight >= self._info.plans_in_flight:
            return idle
        start = time.monotonic_ns()
        due = self._due()
        if due > start:
            return min(due - start, idle)
        return 0 if self._plan(start) else idle

    def _due(self) -> int:
        """When the next plan is to be made: at once if the device idles, or runs a step of unknown length."""
        steps = [self._times.predict(shape) * repeat for shape, repeat, _ in self._shapes]
        if not steps or not all(steps) or not self._info.tokens_ahead:
            return 0
        return self._began + sum(steps) - self._times.lead(steps[-1])

    def _plan(self, start: int) -> bool:
        plan = self.core.plan(start, self._max_repeat())
        if plan is None:
            return False
        flight = self.core.last_flight
        assert flight is not None
        flight.plan_ns = time.monotonic_ns() - start
        self._executor.submit(plan)
        end = time.monotonic_ns()
        if not self._shapes:
            self._began = end
        self._last_shape = self._times.shape(flight.decodes, flight.prefill_rows)
        self._shapes.append((self._last_shape, flight.repeat, end - start))
        return True

    def _max_repeat(self) -> int:
        """How many steps like the last one make a burst."""
        step_ns = self._times.predict(self._last_shape)
        return max(1, min(self._info.max_repeat, _BURST_NS // step_ns)) if step_ns else 1

    def _sleep(self, seconds: float) -> None:
        """Until the time has passed, a result is there, or, if nothing is in flight or planned for, a command is."""
        executor = self._executor.fileno()
        waits_for_commands = not self.core.in_flight or not self.core.has_work
        if not waits_for_commands:
            select.select([executor], [], [], seconds)
        elif self._commands.prepare_sleep():
            select.select([executor, self._commands.fileno()], [], [], seconds)
            self._commands.end_sleep()
