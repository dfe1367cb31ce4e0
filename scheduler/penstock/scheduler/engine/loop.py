"""The engine's loop: commands in, plans out, results in, records out.

Each turn: beat · take commands · absorb results · send records · plan if it is time · sleep until something happens.

**Late submission.** While a step runs, the next plan is made as late as it can be: at the step's predicted end minus a
lead. So every plan contains whatever arrived before it, and a request waits for at most one step and a lead. What is
predicted counts from the moment when the step really began, the result before it, so that errors do not add up.

**One poisonous request fails alone**: what the core does not take, whatever it raises, ends as FAILED.

Nothing here blocks but the sleep, which ends after 50 ms at the latest; no record that the gate's ring does not take is
lost, and while there are any no plan is made.
"""

import select
import time
from collections import deque
from typing import Final

from penstock.executor.executor import Executor
from penstock.executor.ring import RingReader, RingWriter
from penstock.executor.step import ModelInfo, unpack_u32
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.engine.timing import StepTimes
from penstock.scheduler.records import commands, events
from penstock.scheduler.records.vitals import EngineState, Vitals
from penstock.telemetry.logging import get_logger

_TURN_S: Final = 0.05
_LOAD_NS: Final = 100_000_000
_COMMANDS_A_TURN: Final = 256

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
    ) -> None:
        self._info = info
        self._executor = executor
        self._commands = commands_ring
        self._events = events_ring
        self._vitals = vitals
        self.core = Core(info, FirstComeFirstServed(), traced_step_every=traced_step_every)
        self._times = StepTimes()
        self._backlog: deque[bytes] = deque()
        self._running = True
        self._next_load = 0
        self._steps = 0
        self._began = 0
        """When the oldest plan in flight began to run."""
        self._last_result = 0
        self._shapes: deque[tuple[tuple[int, int], int]] = deque()
        """Of each plan in flight its shape, and the host's time for it."""

    def run(self) -> None:
        """Until a Shutdown command. Raises ExecutorError if the executor fails."""
        while self._running:
            self.turn()

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
            self.core.absorb(result, now)
            shape, host_ns = self._shapes.popleft()
            self._times.observe(shape, result.device_ns, host_ns)
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
        steps = [self._times.predict(shape) for shape, _ in self._shapes]
        if not steps or not all(steps) or not self._info.tokens_ahead:
            return 0
        return self._began + sum(steps) - self._times.lead(steps[-1])

    def _plan(self, start: int) -> bool:
        plan = self.core.plan(start)
        if plan is None:
            return False
        flight = self.core.last_flight
        assert flight is not None
        flight.plan_ns = time.monotonic_ns() - start
        self._executor.submit(plan)
        end = time.monotonic_ns()
        if not self._shapes:
            self._began = end
        self._shapes.append((self._times.shape(flight.decodes, flight.prefill_rows), end - start))
        return True

    def _sleep(self, seconds: float) -> None:
        """Until the time has passed, a result is there, or, if nothing is in flight or planned for, a command is."""
        executor = self._executor.fileno()
        waits_for_commands = not self.core.in_flight or not self.core.has_work
        if not waits_for_commands:
            select.select([executor], [], [], seconds)
        elif self._commands.prepare_sleep():
            select.select([executor, self._commands.fileno()], [], [], seconds)
            self._commands.end_sleep()
