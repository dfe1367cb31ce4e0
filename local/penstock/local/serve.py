"""`penstock serve`: a whole serving system on this machine, until it is told to stop."""

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from penstock.config.process import set_process_name
from penstock.local import console, lifetime, state
from penstock.local.layout import resolve
from penstock.local.supervisor import Running


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; 0 if all was drained. Raises ConfigError."""
    layout = resolve(argv, prog="penstock serve")
    set_process_name("penstock-serve")
    return asyncio.run(lifetime.run(layout, _stay, code_if_stopped=0))


async def _stay(running: Running) -> int:
    """Announce what runs, and stay until cancelled; the state file is there as long."""
    path = state.state_path()
    try:
        _write(running, path)
        _announce(running)
        await asyncio.Event().wait()
    finally:
        state.remove(path, os.getpid())
    return 0


def _announce(running: Running) -> None:
    """One line that it is ready, one of what to try; that nobody can read them is no reason to end."""
    try:
        print(f"ready grpc={running.grpc_address} model={running.model} pid={os.getpid()}")
        print('try: penstock generate "def fibonacci(n):"   then: penstock trace', flush=True)
    except OSError:
        console.discard_output()


def _write(running: Running, path: Path) -> None:
    pid = os.getpid()
    entry = state.ServeState(
        pid=pid,
        started_ticks=state.started_ticks(pid) or 0,
        grpc_address=running.grpc_address,
        trace_address=running.trace_address,
        model=running.model,
    )
    try:
        state.write(entry, path)
    except OSError as error:
        addresses = f"--address {running.grpc_address}, trace needs --receiver {running.trace_address}"
        print(f"warning: no state file ({error}): generate needs {addresses}", file=sys.stderr)
