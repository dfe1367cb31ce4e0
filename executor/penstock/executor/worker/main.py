"""A worker process: ``python -m penstock.executor.worker.main ARGUMENTS``, started by the multiprocess executor."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from typing import Final

import msgspec

from penstock.config.process import exit_with_parent, set_process_name
from penstock.executor.executor import ExecutorError
from penstock.executor.models.errors import one_line
from penstock.executor.ring import RingHandle, RingReader, RingWriter
from penstock.executor.step import StepPlan, StepResult, decode_plan, encode_result
from penstock.executor.worker.arguments import END, FAILED, PROGRESS, READY, RESULT, Stage, WorkerArguments
from penstock.executor.worker.pipeline import Pipeline
from penstock.executor.worker.worker import Worker
from penstock.telemetry import logging

_ROOM_S: Final = 60.0
"""How long a message waits for room in the ring: whoever takes nothing for so long is gone."""
_LOOK_S: Final = 0.5

log = logging.get_logger(__name__)


class Link:
    """The worker's ends of both rings."""

    def __init__(self, arguments: WorkerArguments) -> None:
        self._plans = RingReader(RingHandle.decode(arguments.plans))
        self._results = RingWriter(RingHandle.decode(arguments.results))
        self._writing = threading.Lock()
        self.ended = threading.Event()
        """Set: take no more plans."""

    def take(self) -> StepPlan | None:
        """Wait for the next plan; None: end."""
        while not self.ended.is_set():
            message = self._plans.wait(_LOOK_S)
            if message is not None:
                return None if message == END else decode_plan(message)
        return None

    def say(self, kind: bytes, content: bytes) -> None:
        """Send a message. Raises TimeoutError if nobody makes room for it."""
        give_up = time.monotonic() + _ROOM_S
        with self._writing:
            while not self._results.put(kind + content):
                if time.monotonic() > give_up:
                    raise TimeoutError("the executor takes no results")
                time.sleep(0.001)

    def give(self, result: StepResult) -> None:
        """Send a result."""
        self.say(RESULT, encode_result(result))

    def fail(self, failure: str) -> None:
        """Send the last words, and take no more plans."""
        log.error("worker.failed", reason=failure)
        self.say(FAILED, failure.encode())
        self.ended.set()


def serve(arguments: WorkerArguments, link: Link) -> None:
    """Load the model, say so, and run plans until told to end. Raises ExecutorError if it cannot be loaded."""

    def progress(name: str, done: int, total: int) -> None:
        link.say(PROGRESS, msgspec.msgpack.encode(Stage(name, done, total)))

    worker = Worker.start(arguments.spec, progress)
    info = worker.info
    log.info(
        "worker.ready",
        device=info.device,
        attention=info.attention_backends,
        ms=info.startup_ms,
        bytes=info.memory_bytes,
    )
    pipeline = Pipeline(worker.runner, link.take, link.give, link.fail)
    collector = threading.Thread(target=pipeline.collect_all, name="collect", daemon=True)
    gc.collect()
    gc.freeze()
    link.say(READY, msgspec.msgpack.encode(worker.info))
    collector.start()
    pipeline.launch_all()
    collector.join(_ROOM_S)


def main() -> int:
    """Run the worker; 0 after it was told to end, 1 if it cannot go on (the executor has the reason)."""
    arguments = WorkerArguments.parse(sys.argv[1])
    exit_with_parent(arguments.parent_pid)
    set_process_name("penstock-worker")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gate decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.configure("worker", arguments.log_level)
    link = Link(arguments)
    try:
        serve(arguments, link)
    except ExecutorError as error:
        link.say(FAILED, str(error).encode())
        return 1
    except Exception as error:  # a fault of ours: the executor is told, the log has the rest
        log.error("worker.failed", exc_info=error)
        link.say(FAILED, f"the worker failed: {one_line(error)}".encode())
        return 1
    return int(link.ended.is_set())


if __name__ == "__main__":
    sys.exit(main())
