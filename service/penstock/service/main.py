"""The service process: `python -m penstock.service.main` with the flags of `ServiceConfig`."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from penstock.config import ConfigError, load, run_or_exit
from penstock.config.process import check_ready_fd, die_with_parent, report_ready, set_process_name
from penstock.rpc.server import BindError
from penstock.service import processes
from penstock.service.app import Service
from penstock.service.config import ServiceConfig
from penstock.telemetry import logging, tracing
from penstock.telemetry.tracing import Tracing

DESCRIPTION = "The public gRPC front door: authenticates, tokenizes, routes to schedulers, streams."


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Raises `ConfigError`."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load(ServiceConfig, arguments, os.environ, prog="penstock service", description=DESCRIPTION)
    check_ready_fd(config.ready_fd)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    set_process_name("penstock-service")
    logging.configure("service", config.log_level)
    if config.service_processes > 1:
        return asyncio.run(processes.serve(config))
    try:
        spans = tracing.configure("service", endpoint=config.otlp_endpoint, sample_ratio=config.trace_sample_ratio)
    except ValueError as error:
        raise ConfigError(f"otlp_endpoint: {error}") from error
    try:
        return asyncio.run(_serve(config, spans))
    finally:
        spans.shutdown()


async def _serve(config: ServiceConfig, spans: Tracing) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        service = Service(config, spans)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        address = await service.start()
    except BindError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if config.ready_fd is not None:
        report_ready(config.ready_fd, {"address": address, "pid": os.getpid(), "role": "service"})
    await _until(stop, service)
    await service.drain()
    return 0


async def _until(stop: asyncio.Event, service: Service) -> None:
    """Wait for `stop`. Raises what a link failed with, which is a defect."""
    waits = [asyncio.create_task(stop.wait()), asyncio.create_task(service.failed())]
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in done:
            wait.result()
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


if __name__ == "__main__":
    run_or_exit(main)
