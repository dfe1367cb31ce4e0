"""The loop over real rings and the simulated executor."""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest

from penstock.executor.executor import Executor
from penstock.executor.ring import RingReader, RingWriter, create_ring
from penstock.executor.simulated import SimulatedExecutor, answer
from penstock.executor.step import ModelInfo, ModelSpec, Sampling, StepPlan, pack_u32, unpack_u32
from penstock.scheduler.engine.loop import Loop
from penstock.scheduler.records import commands, events
from penstock.scheduler.records.vitals import EngineState, Vitals


class Bench:
    """A loop and the gate's ends of its rings."""

    def __init__(
        self,
        *,
        depth: int,
        step_us: int,
        ring_bytes: int = 1 << 20,
        slots: int = 64,
        executor: Executor | None = None,
    ) -> None:
        executor = executor or SimulatedExecutor()
        spec = ModelSpec(path="/nonexistent", plans_in_flight=depth, step_us=step_us, max_sequences=slots)
        self.info: ModelInfo = executor.start(spec, lambda stage, done, total: None)
        self.executor = executor
        command_ring, event_ring = create_ring(1 << 20), create_ring(ring_bytes)
        self.commands, self.events = RingWriter(command_ring), RingReader(event_ring)
        self.vitals = Vitals.create()
        self.loop = Loop(self.info, executor, RingReader(command_ring), RingWriter(event_ring), self.vitals)
        self.outputs: dict[int, list[int]] = {}
        self.finished: dict[int, events.Finished] = {}
        self.load: events.Load | None = None

    def send(self, command: commands.Command) -> None:
        assert self.commands.put(commands.encode(command))

    def submit(self, handle: int, max_tokens: int, prompt: range = range(20)) -> None:
        sample = commands.SubmitSample(handle, 0, 1)
        self.send(commands.Submit((sample,), pack_u32(list(prompt)), Sampling(), max_tokens, time.monotonic_ns()))

    def take(self, timeout_s: float = 0.0) -> bool:
        data = self.events.wait(timeout_s)
        if data is None:
            return False
        match events.decode(data):
            case events.Step() as step:
                ids = iter(unpack_u32(step.ids))
                for handle, count in zip(unpack_u32(step.handles), step.counts, strict=True):
                    self.outputs.setdefault(handle, []).extend(next(ids) for _ in range(count))
                self.finished.update((finished.handle, finished) for finished in step.finished)
            case events.LoadReport(load):
                self.load = load
        return True

    def turn_until_finished(self, count: int, turns: int = 20_000) -> None:
        for _ in range(turns):
            if len(self.finished) == count:
                return
            self.loop.turn()
            while self.take():
                pass
        raise AssertionError(f"{len(self.finished)} of {count} ended")


@contextmanager
def running(bench: Bench) -> Iterator[None]:
    """The loop on a thread of its own."""
    thread = threading.Thread(target=bench.loop.run)
    thread.start()
    try:
        yield
    finally:
        bench.send(commands.Shutdown())
        thread.join(5)
        bench.executor.shutdown()
    assert not thread.is_alive()


def undisturbed(prompt: range, count: int, vocab_size: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(answer(ids, vocab_size))
    return ids[len(prompt) :]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_tokens_come_out_as_if_alone(depth: int) -> None:
    bench = Bench(depth=depth, step_us=0)
    for handle in range(1, 20):
        bench.submit(handle, 10 * handle, range(handle))
    bench.turn_until_finished(19)
    for handle in range(1, 20):
        assert bench.outputs[handle] == undisturbed(range(handle), 10 * handle, bench.info.vocab_size)
    assert bench.load is not None


def test_a_full_event_ring_loses_nothing_and_stops_planning() -> None:
    bench = Bench(depth=2, step_us=0, ring_bytes=16_384)
    for handle in range(1, 40):
        bench.submit(handle, 100)
    for _ in range(120):
        bench.loop.turn()
    before = bench.vitals.tick
    bench.loop.turn()
    assert bench.vitals.tick == before + 1, "the engine lives while it waits"
    assert bench.loop._backlog
    assert len(bench.loop._backlog) <= 4
    bench.turn_until_finished(39)
    expected = undisturbed(range(20), 100, bench.info.vocab_size)
    assert all(output == expected for output in bench.outputs.values())


def test_cancel_and_drain() -> None:
    bench = Bench(depth=2, step_us=0)
    bench.submit(1, 4000)
    for _ in range(20):
        bench.loop.turn()
    bench.send(commands.Cancel(pack_u32([1, 77])))
    bench.send(commands.Drain())
    bench.turn_until_finished(1)
    assert bench.finished[1].reason == events.Finish.CANCELLED
    assert bench.vitals.state is EngineState.DRAINING


def test_an_idle_engine_ticks_and_reports() -> None:
    bench = Bench(depth=2, step_us=0)
    with running(bench):
        before = bench.vitals.tick
        time.sleep(1.0)
        assert bench.vitals.tick - before >= 10
        reports = 0
        while bench.take():
            reports += 1
    assert 8 <= reports <= 12


def test_planning_hides_behind_the_device() -> None:
    """A step of 10 ms and a planner of 8 ms follow one another every 10 ms, not every 18."""
    bench = Bench(depth=2, step_us=10_000)
    plan = bench.loop.core.plan
    ends: list[float] = []

    def slow_plan(now: int, max_repeat: int = 1) -> StepPlan | None:
        time.sleep(0.008)
        return plan(now, max_repeat)

    bench.loop.core.plan = slow_plan  # type: ignore[method-assign]
    bench.submit(1, 120)
    with running(bench):
        while 1 not in bench.finished:
            assert bench.take(2.0)
            if len(ends) < len(bench.outputs.get(1, ())):
                ends.append(time.monotonic())
    periods = [(b - a) * 1000 for a, b in pairwise(ends[40:])]
    assert 9 < statistics.median(periods) < 12


class Watched(SimulatedExecutor):
    """Remembers when each step began, and which of them admitted somebody."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[int] = []
        self.admitting: list[int] = []

    def submit(self, plan: StepPlan) -> None:
        if plan.admissions:
            self.admitting.append(len(self.begun))
        self.begun.append(max(self._free_ns, time.monotonic_ns()))
        super().submit(plan)


class Tardy(Watched):
    """A device that needs 1 ms between two steps and does not count it."""

    def submit(self, plan: StepPlan) -> None:
        self._free_ns = max(self._free_ns, time.monotonic_ns()) + 1_000_000
        super().submit(plan)


@pytest.mark.parametrize("kind", [Watched, Tardy])
def test_a_plan_is_made_late_so_that_arrivals_are_in_it(kind: type[Watched]) -> None:
    """With 20 ms steps and a fast planner, who arrives in the middle of a step is in the next one."""
    executor = kind()
    bench = Bench(depth=2, step_us=20_000, executor=executor)
    arrivals: list[int] = []
    leads: list[int] = []
    bench.submit(1, 150)
    with running(bench):
        while len(bench.outputs.get(1, ())) < 40:
            assert bench.take(2.0)
        for handle in range(2, 30):
            time.sleep(0.025 + handle * 0.0007)
            leads.append(bench.loop._times.lead(20_000_000))
            bench.submit(handle, 1)
            arrivals.append(time.monotonic_ns())
            while handle not in bench.finished:
                assert bench.take(2.0)
        bench.send(commands.Cancel(pack_u32([1])))
    assert min(leads) < 5_000_000, "a plan takes far less than a millisecond"
    in_time, in_next = 0, 0
    for arrived, lead, step in zip(arrivals, leads, executor.admitting[1:], strict=True):
        following = next(number for number, begun in enumerate(executor.begun) if begun > arrived)
        if executor.begun[following] - arrived > lead + 2_000_000:  # one of them is Tardy's
            in_time += 1
            in_next += step == following
    assert in_time >= 8
    assert in_next >= 0.9 * in_time
    waits = [(bench.finished[handle].first_token_ns - at) / 1e6 - 20 for handle, at in enumerate(arrivals, 2)]
    assert max(waits) < 60


def test_a_request_that_the_core_cannot_take_fails_alone() -> None:
    bench = Bench(depth=2, step_us=0)
    take = bench.loop.core.submit

    def choke(request: commands.Submit) -> None:
        if request.tenant == "poison":
            raise KeyError("nobody thought of this")
        take(request)

    bench.loop.core.submit = choke  # type: ignore[method-assign]
    bench.submit(1, 100)
    for handle, prompt, tenant in ((2, b"abc", ""), (3, pack_u32([1]), "poison")):
        sample = commands.SubmitSample(handle, 0, 1)
        bench.send(commands.Submit((sample,), prompt, Sampling(), 5, 1, tenant=tenant))
    bench.submit(4, 100)
    bench.turn_until_finished(4)
    assert [bench.finished[handle].reason for handle in (1, 2, 3, 4)] == [
        events.Finish.LENGTH,
        events.Finish.FAILED,
        events.Finish.FAILED,
        events.Finish.LENGTH,
    ]
    assert bench.outputs.keys() == {1, 4}
    assert "nobody thought of this" in bench.finished[3].detail


@pytest.mark.parametrize("max_tokens", [1, 2, 100])
def test_a_long_step_neither_stops_the_tick_nor_spins(max_tokens: int) -> None:
    """With one token to make there is nothing to plan meanwhile; with more the next plan waits for its moment."""
    bench = Bench(depth=2, step_us=600_000)
    bench.submit(1, max_tokens)
    with running(bench):
        time.sleep(0.1)
        before, cpu = bench.vitals.tick, time.process_time()
        time.sleep(0.4)
        ticks, cpu = bench.vitals.tick - before, time.process_time() - cpu
    assert 4 <= ticks <= 20
    assert cpu < 0.1


def test_deadlines_pass_while_a_long_step_runs() -> None:
    bench = Bench(depth=1, step_us=500_000)
    deadline = time.monotonic_ns() + 100_000_000
    bench.send(
        commands.Submit((commands.SubmitSample(1, 0, 1),), pack_u32([1]), Sampling(), 5, 1, deadline_ns=deadline)
    )
    with running(bench):
        while 1 not in bench.finished:
            assert bench.take(0.3)
    assert bench.finished[1].reason == events.Finish.DEADLINE
    assert bench.finished[1].finished_ns - deadline < 200_000_000
