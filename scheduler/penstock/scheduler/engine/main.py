"""The engine process: ``python -m penstock.scheduler.engine.main ARGUMENTS``, started by the gate."""

import gc
import signal
import sys
import time
from typing import Final

from penstock.config.process import die_with_parent, set_process_name
from penstock.executor.executor import Executor, ExecutorError, Progress
from penstock.executor.models.errors import one_line
from penstock.executor.models.progress import ProgressBar
from penstock.executor.ring import RingHandle, RingReader, RingWriter
from penstock.scheduler.engine.background import run_beside
from penstock.scheduler.engine.loop import Loop
from penstock.scheduler.records import events
from penstock.scheduler.records.startup import EngineArguments, EngineSpec
from penstock.scheduler.records.vitals import EngineState, Vitals
from penstock.telemetry import logging

_LAST_WORDS_S: Final = 1.0

log = logging.get_logger(__name__)


def create_executor(spec: EngineSpec) -> Executor:
    """The executor that is named; only its own modules are loaded. Raises ExecutorError for an unknown one."""
    match spec.executor:
        case "multiprocess":
            from penstock.executor.multiprocess import MultiprocessExecutor

            return MultiprocessExecutor(step_seconds=spec.step_timeout_s, log_level=spec.log_level)
        case "uniproc":
            from penstock.executor.uniproc import UniprocExecutor

            return UniprocExecutor()
        case "simulated":
            from penstock.executor.simulated import SimulatedExecutor

            return SimulatedExecutor()
        case unknown:
            raise ExecutorError(f"unknown executor {unknown!r}: multiprocess, uniproc or simulated")


def _progress(log_level: str) -> Progress:
    """A bar on a terminal, lines in a log that wants them."""
    if sys.stderr.isatty() or log_level in ("debug", "info"):
        return ProgressBar()
    return lambda stage, done, total: None


def serve(arguments: EngineArguments, events_ring: RingWriter, vitals: Vitals) -> None:
    """Start, serve until told to end, shut down. Raises ExecutorError."""
    executor = create_executor(arguments.spec)
    progress = _progress(arguments.spec.log_level)
    begun = time.monotonic()
    try:
        info = run_beside(lambda: executor.start(arguments.spec.model, progress), vitals.beat)
        try:
            loop = Loop(
                info,
                executor,
                RingReader(RingHandle.decode(arguments.commands)),
                events_ring,
                vitals,
                traced_step_every=arguments.spec.traced_step_every,
                progress=progress,
            )
        except ValueError as error:
            raise ExecutorError(str(error)) from error
        if isinstance(progress, ProgressBar):
            progress.started(time.monotonic() - begun, info.startup_ms)
        events_ring.put(events.encode(events.Started(info)))
        vitals.set_state(EngineState.SERVING)
        gc.collect()
        gc.freeze()
        loop.run()
    finally:
        executor.shutdown()


def say_last(event: events.Event, ring: RingWriter, vitals: Vitals) -> None:
    """Send a record before the end, if the gate makes room for it within a second."""
    give_up = time.monotonic() + _LAST_WORDS_S
    while not ring.put(events.encode(event)) and time.monotonic() < give_up:
        vitals.beat()
        time.sleep(0.01)


def main() -> int:
    """Run the engine; 0 after Shutdown, 1 if it cannot go on (the gate has the reason)."""
    arguments = EngineArguments.parse(sys.argv[1])
    die_with_parent(arguments.parent_pid)
    set_process_name("penstock-engine")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gate decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.configure("engine", arguments.spec.log_level)
    events_ring = RingWriter(RingHandle.decode(arguments.events))
    vitals = Vitals(arguments.vitals_fd)
    try:
        serve(arguments, events_ring, vitals)
    except ExecutorError as error:
        last_words = str(error)
    except Exception as error:  # a fault of ours: the gate is told, the log has the rest
        log.error("engine.failed", exc_info=error)
        last_words = f"the engine failed: {one_line(error)}"
    else:
        return 0
    say_last(events.Failed(last_words), events_ring, vitals)
    return 1


if __name__ == "__main__":
    sys.exit(main())
