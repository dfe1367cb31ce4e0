"""A worker is lost under the loop: it starts another one, lives meanwhile, and no sequence notices."""

import threading
import time
from collections.abc import Sequence

import msgspec
import pytest

from penstock.executor.executor import ExecutorError, Progress, WorkerLost
from penstock.executor.ring import RingReader, RingWriter, create_ring
from penstock.executor.simulated import SimulatedExecutor, answer
from penstock.executor.step import ModelInfo, ModelSpec, Sampling, StepPlan, StepResult, pack_u32, unpack_u32
from penstock.scheduler.engine.loop import Loop
from penstock.scheduler.engine.recovery import MOST_LOSSES
from penstock.scheduler.records import commands, events
from penstock.scheduler.records.vitals import EngineState, Vitals

PROMPT = range(20)


class Fragile:
    """Simulated workers, each lost behind a number of results; then the next one starts."""

    def __init__(self, lives: Sequence[int]) -> None:
        """``lives``: results of each worker before it is lost; -1: it is lost while it starts. The next ones live."""
        self._lives = list(lives)
        self.starts = 0
        self.may_start = threading.Event()
        """Cleared: a restart waits."""
        self.may_start.set()
        self.changes: dict[str, int] = {}
        """How the ModelInfo of the next worker differs."""

    def start(self, spec: ModelSpec, progress: Progress) -> ModelInfo:
        self._spec = spec
        return self.restart(progress)

    def restart(self, progress: Progress) -> ModelInfo:
        assert self.may_start.wait(20)
        self.starts += 1
        self._left = self._lives.pop(0) if self._lives else 1 << 30
        if self._left < 0:
            raise WorkerLost("it died in its cradle")
        self._worker = SimulatedExecutor()
        return msgspec.structs.replace(self._worker.start(self._spec, progress), **self.changes)

    def submit(self, plan: StepPlan) -> None:
        self.check_health()
        self._worker.submit(plan)

    def results(self) -> Sequence[StepResult]:
        self.check_health()
        results = self._worker.results()[: self._left]
        self._left -= len(results)
        return results

    def check_health(self) -> None:
        if not self._left:
            raise WorkerLost("it died")

    def fileno(self) -> int:
        return self._worker.fileno()

    def submit_mask(self, number: int, mask: bytes) -> None:
        self._worker.submit_mask(number, mask)

    def load_adapter(self, path: str, first_row: int) -> int:
        return self._worker.load_adapter(path, first_row)

    def shutdown(self) -> None:
        self._worker.shutdown()


class Bench:
    """A loop on a thread of its own, and the gate's ends of its rings."""

    def __init__(self, executor: Fragile, *, depth: int = 2) -> None:
        spec = ModelSpec(path="/nonexistent", plans_in_flight=depth, step_us=200, max_sequences=8)
        self.executor = executor
        self.info = executor.start(spec, lambda stage, done, total: None)
        command_ring, event_ring = create_ring(1 << 20), create_ring(1 << 20)
        self.commands, self.events = RingWriter(command_ring), RingReader(event_ring)
        self.vitals = Vitals.create()
        self.vitals.set_state(EngineState.SERVING)
        self.loop = Loop(self.info, executor, RingReader(command_ring), RingWriter(event_ring), self.vitals)
        self.outputs: dict[int, list[int]] = {}
        self.finished: dict[int, events.Finished] = {}
        self.spans: list[events.SpanEvent] = []
        self.loads: list[events.Load] = []
        self.failure: ExecutorError | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Bench":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.may_start.set()
        self.send(commands.Shutdown())
        self._thread.join(20)
        self.executor.shutdown()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.loop.run()
        except ExecutorError as error:
            self.failure = error

    def send(self, command: commands.Command) -> None:
        assert self.commands.put(commands.encode(command))

    def submit(self, handle: int, max_tokens: int, **changes: object) -> None:
        sample = commands.SubmitSample(handle, 0, 1)
        request = commands.Submit((sample,), pack_u32(list(PROMPT)), Sampling(), max_tokens, time.monotonic_ns())
        self.send(msgspec.structs.replace(request, **changes))

    def take_until_finished(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.finished) < count:
            assert time.monotonic() < deadline, f"{len(self.finished)} of {count} ended"
            self.take(0.5)

    def take(self, timeout_s: float) -> None:
        data = self.events.wait(timeout_s)
        match events.decode(data) if data is not None else None:
            case events.Step() as step:
                ids = iter(unpack_u32(step.ids))
                for handle, count in zip(unpack_u32(step.handles), step.counts, strict=True):
                    self.outputs.setdefault(handle, []).extend(next(ids) for _ in range(count))
                self.finished.update((finished.handle, finished) for finished in step.finished)
                self.spans += step.spans
            case events.LoadReport(load):
                self.loads.append(load)

    def next_load(self) -> events.Load:
        seen, deadline = len(self.loads), time.monotonic() + 10
        while len(self.loads) == seen:
            assert time.monotonic() < deadline, "it says nothing of its load"
            self.take(0.5)
        return self.loads[-1]

    def await_state(self, state: EngineState) -> None:
        deadline = time.monotonic() + 10
        while self.vitals.state is not state:
            assert time.monotonic() < deadline, f"{self.vitals.state!r}, not {state!r}"
            time.sleep(0.005)

    def await_failure(self) -> str:
        self._thread.join(20)
        assert self.failure is not None
        return str(self.failure)


def undisturbed(count: int, vocab_size: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(answer(ids, vocab_size))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("lives", [[6], [1, 2, 7], [4, -1, -1, 2, 5]])
def test_tokens_are_those_of_an_undisturbed_run(lives: list[int], depth: int) -> None:
    with Bench(Fragile(lives), depth=depth) as bench:
        for handle in range(1, 13):
            bench.submit(handle, 40 + 7 * handle)
        bench.take_until_finished(12)
        load = bench.next_load()
        assert bench.vitals.state is EngineState.SERVING
    for handle in range(1, 13):
        assert bench.outputs[handle] == undisturbed(40 + 7 * handle, bench.info.vocab_size)
    assert bench.executor.starts == 1 + len(lives)
    assert load.free_blocks == load.total_blocks
    assert load.preemptions > 0


def test_while_it_recovers_it_ticks_listens_and_keeps_deadlines() -> None:
    executor = Fragile([5])
    with Bench(executor) as bench:
        executor.may_start.clear()
        bench.submit(1, 300)
        bench.await_state(EngineState.RECOVERING)
        before = bench.vitals.tick
        bench.submit(2, 50)
        bench.submit(3, 50, deadline_ns=time.monotonic_ns() + 200_000_000)
        bench.submit(4, 50)
        bench.send(commands.Cancel(pack_u32([4])))
        bench.take_until_finished(2)
        time.sleep(0.5)
        assert bench.vitals.tick - before >= 5
        assert bench.vitals.state is EngineState.RECOVERING
        assert {handle: one.reason for handle, one in bench.finished.items()} == {
            3: events.Finish.DEADLINE,
            4: events.Finish.CANCELLED,
        }
        executor.may_start.set()
        bench.take_until_finished(4)
    assert bench.outputs[1] == undisturbed(300, bench.info.vocab_size)
    assert bench.outputs[2] == undisturbed(50, bench.info.vocab_size)


def test_an_engine_that_drains_goes_on_draining() -> None:
    executor = Fragile([5])
    with Bench(executor) as bench:
        executor.may_start.clear()
        bench.submit(1, 100)
        bench.await_state(EngineState.RECOVERING)
        bench.send(commands.Drain())
        executor.may_start.set()
        bench.take_until_finished(1)
        assert bench.vitals.state is EngineState.DRAINING
    assert bench.finished[1].reason == events.Finish.LENGTH


def test_the_trace_tells_what_was_lost() -> None:
    with Bench(Fragile([6])) as bench:
        bench.submit(1, 100, traced=True)
        bench.take_until_finished(1)
    told = [span for span in bench.spans if span.kind == events.Span.PREEMPTED]
    assert [(span.handle, span.cause) for span in told] == [(1, "epoch")]
    bursts = 6 - 1 + bench.info.plans_in_flight  # results but that of the prompt's plan, and what was under way
    assert len(PROMPT) <= told[0].number <= len(PROMPT) + bursts * bench.info.max_repeat, "to be computed again"
    assert sum(span.kind == events.Span.QUEUED for span in bench.spans) == 2


@pytest.mark.parametrize("life", [1, -1], ids=["at once", "at its start"])
def test_a_worker_that_is_lost_again_and_again_is_the_end(life: int) -> None:
    with Bench(Fragile([1] + 20 * [life])) as bench:
        bench.submit(1, 100)
        why = bench.await_failure()
    cause = "it died" if life > 0 else "it died in its cradle"
    assert why == f"lost the worker {MOST_LOSSES + 1} times within 10 minutes: {cause}"
    assert bench.executor.starts == 1 + MOST_LOSSES


def test_another_model_is_the_end() -> None:
    executor = Fragile([10])
    with Bench(executor) as bench:
        executor.changes = {"num_blocks": bench.info.num_blocks - 1}
        bench.submit(1, 100)
        why = bench.await_failure()
    assert why == f"the worker came back with num_blocks {bench.info.num_blocks - 1}, it was {bench.info.num_blocks}"
