"""The executor: a few verbs behind which a model computes."""

from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.executor.step import ModelInfo, ModelSpec, StepPlan, StepResult

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done and what there is to do; from any thread."""


class ExecutorError(Exception):
    """The executor cannot go on. The message is one line for the operator, naming what is wrong (file and tensor)."""


class WorkerLost(ExecutorError):
    """A worker has ended, hangs or has failed, and with it all that was on its device: the epoch is over.

    :meth:`Executor.restart` begins anew.
    """


class Executor(Protocol):
    """Computes plans in order. All methods are called from one thread and none but start and shutdown blocks."""

    def start(self, spec: ModelSpec, progress: Progress) -> ModelInfo:
        """Load the model. Raises ExecutorError with one line if it cannot be loaded."""
        ...

    def restart(self, progress: Progress) -> ModelInfo:
        """After WorkerLost: load the model again, with empty slots. Blocks. Raises WorkerLost if that fails, too."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan; at most ModelInfo.plans_in_flight may be unanswered. Raises ExecutorError if it has failed."""
        ...

    def results(self) -> Sequence[StepResult]:
        """Take the results that are there, in the order of their plans; never waits. Raises ExecutorError."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable while results has something to give or to raise, and perhaps once too often."""
        ...

    def submit_mask(self, number: int, mask: bytes) -> None:
        """Give the packed token mask (slots × vocabulary bits) that plan ``number`` waits for before it samples."""
        ...

    def load_adapter(self, path: str, first_row: int) -> int:
        """Start to load an adapter into the rows from first_row; returns the fence to wait for."""
        ...

    def check_health(self) -> None:
        """Raise ExecutorError if it cannot go on."""
        ...

    def shutdown(self) -> None:
        """End all threads and processes; results not taken are dropped. Idempotent; waits at most 10 s."""
        ...
