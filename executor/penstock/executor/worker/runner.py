"""What the worker's pipeline asks of a runner: launch plans in order, collect results in order."""

from __future__ import annotations

from typing import Protocol

from penstock.executor.step import StepPlan, StepResult


class Runner(Protocol):
    """Runs plans strictly in order. One thread launches, another collects."""

    def launch(self, plan: StepPlan) -> None:
        """Apply the plan and launch its step; may return before the device is done.

        A slot of which something impossible is asked fails alone. Raises ExecutorError for a plan out of order or of a
        kind that is not offered, ValueError for a malformed one.
        """
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step launched and return what it made: once for each launch."""
        ...

    def take_thread(self) -> None:
        """Called once by each thread that uses this."""
        ...
