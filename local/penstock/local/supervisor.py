"""Every role of a serving system on this machine, each a process of its own, started and ended as one.

The order: the trace receiver (in this process), the scheduler (which starts its engine itself), the service that
talks to it. Ending goes the other way, so that what runs can finish.
"""

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from penstock.client import AsyncClient, Model, RpcError
from penstock.local.role_process import RoleFailed, RoleProcess
from penstock.local.roles import MODULES, SCHEDULER, SERVICE
from penstock.local.traces.receiver import TraceReceiver

_POLL_S = 0.02
_NOT_YET = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
_CALL_TIMEOUT_S = 2.0
_DRAIN_MARGIN_S = 5.0
"""What a role may take beyond its own grace to leave."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What to start, and how long things may take."""

    grpc_address: str
    """Where the service listens."""
    scheduler_argv: tuple[str, ...] = ()
    service_argv: tuple[str, ...] = ()
    start_timeout_s: float = 300.0
    drain_grace_s: float = 10.0
    api_key: str | None = None
    """For our own question whether the model is ready."""
    modules: Mapping[str, str] = MODULES


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What is running, and where."""

    grpc_address: str
    trace_address: str
    model: str
    pids: dict[str, int]


class Supervisor:
    """Starts the roles of a layout, notices when one ends, and ends them all.

    `start`, then `failure` for as long as it is to run, then `stop` in any case.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._receiver = TraceReceiver()
        self._roles: list[RoleProcess] = []

    async def start(self) -> Running:
        """Start all roles and wait until the model can be used. Raises RoleFailed; OSError and RuntimeError too."""
        deadline = asyncio.get_running_loop().time() + self._layout.start_timeout_s
        await self._receiver.start()
        scheduler = await self._start(SCHEDULER, self._layout.scheduler_argv, "127.0.0.1:0", deadline)
        argv = (*self._layout.service_argv, "--schedulers", scheduler)
        service = await self._start(SERVICE, argv, self._layout.grpc_address, deadline)
        model = await self._model(service, deadline)
        return Running(
            grpc_address=service,
            trace_address=self._receiver.address,
            model=model.name,
            pids={role.name: role.pid for role in self._roles},
        )

    async def failure(self) -> RoleFailed:
        """Wait until a role ends by itself, and say how it did."""
        waits = [asyncio.create_task(role.ended()) for role in self._roles]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            await _abandon(waits)

    async def stop(self) -> list[RoleFailed]:
        """Drain the service, then the scheduler; what did not end as it should."""
        patience_s = self._layout.drain_grace_s + _DRAIN_MARGIN_S
        faults = [await role.drain(patience_s) for role in reversed(self._roles)]
        await self._receiver.stop()
        return [fault for fault in faults if fault is not None]

    def kill(self) -> None:
        """End everything at once; `stop` still has to be awaited."""
        for role in self._roles:
            role.kill()

    async def _start(self, name: str, argv: Sequence[str], address: str, deadline: float) -> str:
        """The address where the role listens, once it is ready."""
        common = ["--grpc-address", address, "--otlp-endpoint", self._receiver.address]
        role = await RoleProcess.start(name, self._layout.modules[name], [*argv, *common])
        self._roles.append(role)
        return (await role.ready(deadline - asyncio.get_running_loop().time())).address

    async def _model(self, address: str, deadline: float) -> Model:
        """The model, once a scheduler takes requests for it."""
        asking = asyncio.create_task(self._ask_for_model(address))
        failing = asyncio.create_task(self.failure())
        left_s = deadline - asyncio.get_running_loop().time()
        try:
            done, _ = await asyncio.wait({asking, failing}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if failing in done:
                raise failing.result()
            if not done:
                raise RoleFailed(f"no scheduler takes requests after {self._layout.start_timeout_s:g} s")
            return asking.result()
        finally:
            await _abandon([asking, failing])

    async def _ask_for_model(self, address: str) -> Model:
        async with AsyncClient(address, api_key=self._layout.api_key, timeout_s=_CALL_TIMEOUT_S) as client:
            while True:
                try:
                    ready = [model for model in await client.models() if model.ready]
                except RpcError as error:
                    if error.code.name not in _NOT_YET:
                        raise RoleFailed(f"the service does not say what it serves: {error}") from error
                    ready = []
                if ready:
                    return ready[0]
                await asyncio.sleep(_POLL_S)


async def _abandon(tasks: Sequence["asyncio.Task[object]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
