"""The life of a supervised system: work is done in it, signals end it, and it always ends whole."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence

from penstock.local.role_process import RoleFailed
from penstock.local.supervisor import Layout, Running, Supervisor

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Work = Callable[[Running], Awaitable[int]]
"""What is done while all roles run; its value is the exit code."""


async def run(layout: Layout, work: Work, *, code_if_stopped: int) -> int:
    """Start the roles, do the work, end the roles; the process's exit code.

    The first SIGTERM or SIGINT ends the work and drains, a further one kills. A role that ends by itself
    ends everything: one line on stderr says which, unless the role has said why itself, and the code is 1, or 2
    if the role refused its configuration.
    """
    supervisor = Supervisor(layout)
    stop_requested = _stop_requests(supervisor)
    working = asyncio.create_task(_work(supervisor, work))
    stopped = asyncio.create_task(stop_requested.wait())
    try:
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        fault = working.exception() if working.done() else None
        await _abandon(working, stopped)
        faults = await _end(supervisor, in_order=fault is None)
    return _report([fault, *faults]) or (code_if_stopped if working.cancelled() else working.result())


async def _work(supervisor: Supervisor, work: Work) -> int:
    """The work's result, or the failure of a role if one comes first."""
    running = await supervisor.start()
    working = asyncio.ensure_future(work(running))
    failing = asyncio.create_task(supervisor.failure())
    try:
        done, _ = await asyncio.wait({working, failing}, return_when=asyncio.FIRST_COMPLETED)
        if working not in done:
            raise failing.result()
        return working.result()
    finally:
        await _abandon(working, failing)


def _stop_requests(supervisor: Supervisor) -> asyncio.Event:
    requested = asyncio.Event()

    def on_signal() -> None:
        if requested.is_set():
            supervisor.kill()
        requested.set()

    for number in _STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return requested


async def _abandon(*tasks: "asyncio.Future[int] | asyncio.Task[bool] | asyncio.Task[RoleFailed]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _end(supervisor: Supervisor, *, in_order: bool) -> list[RoleFailed]:
    """Drain all roles; after a fault kill them, as without one role the others have nothing left to finish."""
    if not in_order:
        supervisor.kill()
    faults = await supervisor.stop()
    return faults if in_order else []


def _report(faults: Sequence[BaseException | None]) -> int:
    """One line for the first fault, and the exit code. What is no fault of a role or of the system is raised."""
    first = next((fault for fault in faults if fault is not None), None)
    if first is None:
        return 0
    if not isinstance(first, RoleFailed | OSError | RuntimeError):
        raise first
    if not (isinstance(first, RoleFailed) and first.explained):
        print(f"error: {first}", file=sys.stderr)
    return first.code if isinstance(first, RoleFailed) else 1
