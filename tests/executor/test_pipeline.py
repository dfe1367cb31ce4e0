"""The two threads around a runner, when plans stop coming while a step hangs."""

from __future__ import annotations

import threading

from penstock.executor.layers.parallel import GroupError
from penstock.executor.step import StepPlan, StepResult
from penstock.executor.worker.pipeline import Pipeline


class HangingRunner:
    """Whose steps end when they are told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def take_thread(self) -> None:
        """Nothing is each thread's own."""

    def launch(self, plan: StepPlan) -> None:
        """Whatever it is."""

    def collect(self) -> StepResult:
        """The oldest."""
        assert self.go_on.wait(30)
        return StepResult(1, 1, b"", b"")


def test_a_source_that_fails_is_known_at_once_and_told_behind_the_results() -> None:
    plans = iter([StepPlan(1, 1)])
    told: list[StepResult | str] = []
    runner = HangingRunner()

    def take() -> StepPlan:
        plan = next(plans, None)
        if plan is None:
            raise GroupError("another rank is lost")
        return plan

    pipeline = Pipeline(runner, take, told.append, told.append)
    collector = threading.Thread(target=pipeline.collect_all)
    collector.start()
    pipeline.launch_all()
    assert (pipeline.failure, told) == ("another rank is lost", [])
    runner.go_on.set()
    collector.join(30)
    assert told == [StepResult(1, 1, b"", b""), "another rank is lost"]
