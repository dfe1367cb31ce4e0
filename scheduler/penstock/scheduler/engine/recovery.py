"""What the engine does while a lost worker is replaced: it ticks, listens and reports, and plans nothing."""

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from penstock.executor.executor import Executor, ExecutorError, Progress, WorkerLost
from penstock.executor.step import ModelInfo
from penstock.scheduler.engine.background import run_beside
from penstock.telemetry.logging import get_logger

MOST_LOSSES: Final = 5
WINDOW_S: Final = 600.0
"""A worker that is lost more often than that will be lost again."""
_CONTRACT: Final = (
    "model_digest",
    "vocab_size",
    "eos_ids",
    "max_model_tokens",
    "max_sequences",
    "max_step_tokens",
    "block_tokens",
    "num_blocks",
    "plans_in_flight",
    "tokens_ahead",
)
"""What must be as it was: the core and the gate's promises are built on it."""

log = get_logger(__name__)


class Recovery:
    """Restarts an executor, a bounded number of times."""

    def __init__(self, executor: Executor, info: ModelInfo) -> None:
        self._executor, self._info = executor, info
        self._losses: deque[float] = deque(maxlen=MOST_LOSSES)

    def restart(self, lost: WorkerLost, idle: Callable[[], None], progress: Progress) -> None:
        """Start another worker; ``idle`` is called many times a second meanwhile.

        Raises ExecutorError if it is another than it was, or was lost too often: also one that is lost while it starts
        is started again.
        """
        began = time.monotonic()
        info = None
        while info is None:
            self._count(lost)
            try:
                info = run_beside(lambda: self._executor.restart(progress), idle)
            except WorkerLost as again:
                lost = again
        for name in _CONTRACT:
            before, after = getattr(self._info, name), getattr(info, name)
            if before != after:
                raise ExecutorError(f"the worker came back with {name} {after}, it was {before}")
        log.info("engine.recovered", seconds=round(time.monotonic() - began, 3))

    def _count(self, lost: WorkerLost) -> None:
        now = time.monotonic()
        if len(self._losses) == MOST_LOSSES and now - self._losses[0] < WINDOW_S:
            raise ExecutorError(f"lost the worker {MOST_LOSSES + 1} times within {WINDOW_S / 60:.0f} minutes: {lost}")
        self._losses.append(now)
        log.error("engine.worker_lost", reason=str(lost))
