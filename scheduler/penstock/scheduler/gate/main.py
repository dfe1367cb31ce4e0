"""The gate process: ``python -m penstock.scheduler.gate.main MODEL`` with the flags of SchedulerConfig."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Sequence

from penstock.config import ConfigError, load, run_or_exit
from penstock.config.process import check_ready_fd, die_with_parent, report_ready, set_process_name
from penstock.rpc.server import BindError
from penstock.rpc.tls import TlsError
from penstock.scheduler.gate.app import Gate
from penstock.scheduler.gate.config import SchedulerConfig
from penstock.scheduler.gate.tokenizer import TokenizerError, TokenizerFiles
from penstock.telemetry import logging, tracing
from penstock.telemetry.tracing import Tracing

DESCRIPTION = "One model replica: a gate that takes attempts from services, and the engine that it starts."


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or Drain: 0. The engine cannot start or is lost: 1. Raises ConfigError."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load(
        SchedulerConfig,
        arguments,
        os.environ,
        prog="penstock scheduler",
        description=DESCRIPTION,
        positional="model",
    )
    check_ready_fd(config.ready_fd)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    set_process_name("penstock-gate")
    logging.configure("gate", config.log_level)
    try:
        tokenizer = TokenizerFiles.read(config.model)
    except TokenizerError as error:
        return _fail(str(error))
    try:
        spans = tracing.configure("gate", endpoint=config.otlp_endpoint)
    except ValueError as error:
        raise ConfigError(f"otlp_endpoint: {error}") from error
    try:
        return asyncio.run(_serve(config, tokenizer, spans))
    finally:
        spans.shutdown()


async def _serve(config: SchedulerConfig, tokenizer: TokenizerFiles, spans: Tracing) -> int:
    try:
        gate = Gate(config, tokenizer, spans)
    except TlsError as error:
        raise ConfigError(str(error)) from error
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, gate.drain_asked.set)
    try:
        return await _run(config, gate)
    except (BindError, OSError) as error:
        return _fail(str(error))
    finally:
        await gate.close()


async def _run(config: SchedulerConfig, gate: Gate) -> int:
    """Start, be ready, and wait for the end, whichever comes."""
    address = await gate.start()
    lost = asyncio.create_task(gate.engine.ended(), name="engine")
    asked = asyncio.create_task(gate.drain_asked.wait(), name="drain")
    ready = asyncio.create_task(gate.ready(), name="ready")
    try:
        await asyncio.wait({lost, asked, ready}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and not lost.done():
            _say_ready(config, address)
            await asyncio.wait({lost, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not lost.done():
            await _drain(gate, lost)
        if not lost.done():
            return 0
        await gate.lose_engine()
        return _fail(lost.result())
    finally:
        for task in (lost, asked, ready):
            task.cancel()
        await asyncio.gather(lost, asked, ready, return_exceptions=True)


async def _drain(gate: Gate, lost: "asyncio.Task[str]") -> None:
    """Drain, unless the engine is lost before that is done."""
    draining = asyncio.create_task(gate.drain(), name="draining")
    try:
        await asyncio.wait({draining, lost}, return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            draining.result()
    finally:
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)


def _say_ready(config: SchedulerConfig, address: str) -> None:
    gc.collect()
    gc.freeze()  # what is there now stays: later collections pass over it
    if config.ready_fd is not None:
        report_ready(config.ready_fd, {"address": address, "pid": os.getpid(), "role": "scheduler"})


def _fail(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    run_or_exit(main)
