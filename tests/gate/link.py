"""A gate in this process with a fake engine in another, and a service by hand."""

import asyncio
import contextlib
import secrets
import sys
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from gate import fake_engine
from penstock.rpc.channel import open_channel
from penstock.rpc.errors import RpcError
from penstock.rpc.stubs import SchedulerStub
from penstock.scheduler.gate.app import Gate
from penstock.scheduler.gate.config import SchedulerConfig
from penstock.scheduler.gate.tokenizer import TokenizerFiles
from penstock.scheduler.records.startup import EngineArguments
from penstock.telemetry import tracing
from penstock.telemetry.tracing import Tracing
from penstock.v1 import (
    Ack,
    Cancel,
    CancelReason,
    ConnectRequest,
    Draining,
    Failure,
    GetStatusRequest,
    GetStatusResponse,
    Hello,
    Load,
    Outputs,
    ProtocolVersion,
    SampleFinished,
    Submit,
    SubmitSample,
    SubmitSampling,
    Welcome,
)

WAIT_S = 8.0
PROTOCOL = ProtocolVersion(major=1, minor=0)


def u32(values: Sequence[int]) -> bytes:
    return array("I", values).tobytes()


def engine_command(arguments: EngineArguments) -> list[str]:
    return [sys.executable, fake_engine.__file__, arguments.argv()[-1]]


@contextlib.asynccontextmanager
async def running_gate(
    folder: Path, spans: Tracing | None = None, *, is_ready: bool = True, **settings: Any
) -> AsyncIterator["Running"]:
    (folder / "tokenizer.json").write_text('{"model": {}}')
    config = SchedulerConfig(
        **{"model": folder, "grpc_address": "127.0.0.1:0", "max_sequences": fake_engine.SLOTS, **settings}
    )
    gate = Gate(config, TokenizerFiles.read(folder), spans or tracing.configure("gate", endpoint=None), engine_command)
    try:
        address = await gate.start()
        async with asyncio.timeout(WAIT_S):
            await gate.ready()
        yield Running(gate, address)
    finally:
        await gate.close()


class Running:
    """A gate that serves."""

    def __init__(self, gate: Gate, address: str) -> None:
        self.gate = gate
        self.address = address

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[SchedulerStub]:
        channel = open_channel(self.address)
        try:
            yield SchedulerStub(channel)
        finally:
            await channel.close()

    async def status(self) -> GetStatusResponse:
        async with self.stub() as stub:
            return await stub.get_status(GetStatusRequest(), timeout=5)

    async def until(self, condition: Callable[[GetStatusResponse], bool], what: str) -> GetStatusResponse:
        """Until a status fulfils the condition."""
        seen = await self.status()
        try:
            async with asyncio.timeout(WAIT_S):
                while not condition(seen):
                    await asyncio.sleep(0.02)
                    seen = await self.status()
        except TimeoutError:
            raise AssertionError(f"{what}: not within {WAIT_S} s: {seen}") from None
        return seen


async def read_to_end(call: Any) -> None:
    """Until the stream ends, as it does: with an error, or without one."""
    while await call.read() not in (None, grpc.aio.EOF):
        pass


def running(status: GetStatusResponse) -> int:
    assert status.load is not None
    return status.load.running


def submit(prompt: Sequence[int], max_tokens: int = 5, **fields: Any) -> Submit:
    """A Submit that is right unless ``fields`` make it wrong."""
    sampling = fields.pop("sampling", {})
    return Submit(
        **{
            "attempt_id": secrets.token_bytes(16),
            "prompt_ids": u32(prompt),
            "prompt_tokens": len(prompt),
            "samples": [SubmitSample(seed=1)],
            "sampling": SubmitSampling(
                **{"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": max_tokens, **sampling}
            ),
            **fields,
        }
    )


class Service:
    """One session, over one stream after another. It acknowledges nothing by itself but to say that it lives."""

    def __init__(self, address: str, session: bytes | None = None) -> None:
        self.address = address
        self.session = session or secrets.token_bytes(16)
        self.ids: dict[int, list[int]] = {}
        """By handle."""
        self.delivered: dict[bytes, list[int]] = {}
        """What an earlier attempt delivered, by attempt."""
        self.accepted: dict[bytes, int] = {}
        self.rejected: dict[bytes, Failure] = {}
        self.finished: dict[int, SampleFinished] = {}
        self.failed: dict[int, Failure] = {}
        self.load = Load()
        self.loads = 0
        self.draining: Draining | None = None
        self.outputs = 0
        self.end: RpcError | None = None
        """What the stream ended with."""
        self.beats = True
        self.reads = True
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Service":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disconnect()

    async def connect(self, handles: Sequence[int] = (), offsets: Sequence[int] | None = None) -> Welcome:
        """A new stream on a new channel, which names these handles; by default with all ids that came."""
        offsets = [len(self.ids.get(handle, ())) for handle in handles] if offsets is None else offsets
        self._channel = open_channel(self.address)
        self.end = None
        self.call = SchedulerStub(self._channel).connect()
        hello = Hello("test", self.session, PROTOCOL, u32(handles), u32(offsets))
        await self.call.write(ConnectRequest(hello=hello))
        async with asyncio.timeout(WAIT_S):
            first = await self.call.read()
        assert first is not None
        assert first.welcome is not None, first
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]
        return first.welcome

    async def disconnect(self) -> None:
        """Cut the connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def say(self, **kind: Any) -> None:
        async with self._writing:  # beats come from a task of their own, and a stream takes one write at a time
            await self.call.write(ConnectRequest(**kind))

    async def submit(self, message: Submit) -> int:
        """Submit, and wait for the handle. Raises AssertionError if it is rejected."""
        await self.say(submit=message)
        await self.until(lambda: message.attempt_id in self.accepted or message.attempt_id in self.rejected, "answer")
        assert message.attempt_id not in self.rejected, self.rejected
        return self.accepted[message.attempt_id]

    async def refused(self, message: Submit) -> Failure:
        """Submit, and wait for the rejection."""
        await self.say(submit=message)
        await self.until(lambda: message.attempt_id in self.accepted or message.attempt_id in self.rejected, "answer")
        assert message.attempt_id in self.rejected
        return self.rejected[message.attempt_id]

    async def cancel(self, attempt_id: bytes, reason: CancelReason = CancelReason.CLIENT) -> None:
        await self.say(cancel=Cancel(attempt_id=attempt_id, reason=reason))

    async def acknowledge(self, offsets: dict[int, int], finished: Sequence[int] = ()) -> None:
        await self.say(ack=Ack(u32(list(offsets)), u32(list(offsets.values())), u32(finished)))

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Until it is so."""
        try:
            async with asyncio.timeout(WAIT_S):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not within {WAIT_S} s: {what}; the stream: {self.end!r}") from None

    async def _beat(self) -> None:
        with contextlib.suppress(RpcError):
            while True:
                await asyncio.sleep(0.05)
                if self.beats:
                    await self.say(ack=Ack())

    async def _read(self) -> None:
        try:
            while True:
                while not self.reads:
                    await asyncio.sleep(0.01)
                message = await self.call.read()
                if message is None:
                    break
                self._take(message)
                self._changed.set()
        except RpcError as error:
            self.end = error
        self._changed.set()

    def _take(self, message: Any) -> None:
        if message.accepted is not None:
            accepted = message.accepted
            self.accepted[accepted.attempt_id] = accepted.first_handle
            self.ids.setdefault(accepted.first_handle, list(self.delivered.get(accepted.attempt_id, ())))
        elif message.rejected is not None:
            self.rejected[message.rejected.attempt_id] = message.rejected.failure
        elif message.load is not None:
            self.load, self.loads = message.load, self.loads + 1
        elif message.draining is not None:
            self.draining = message.draining
        elif message.outputs is not None:
            self._take_outputs(message.outputs)

    def _take_outputs(self, outputs: Outputs) -> None:
        self.outputs += 1
        columns = (array("I", data) for data in (outputs.handles, outputs.offsets, outputs.counts))
        ids = array("I", outputs.ids)
        start = 0
        for handle, offset, count in zip(*columns, strict=True):
            mine = self.ids.setdefault(handle, [])
            assert offset <= len(mine), f"ids {len(mine)} to {offset} of {handle} are missing"
            assert offset == len(mine), f"ids {offset} to {len(mine)} of {handle} came twice"
            mine.extend(ids[start : start + count])
            start += count
        assert start == len(ids)
        for end in outputs.finished:
            assert end.handle not in self.finished or self.finished[end.handle] == end
            assert len(self.ids.get(end.handle, ())) == end.tokens
            self.finished[end.handle] = end
        for failed in outputs.failed:
            assert failed.failure is not None
            self.failed[failed.handle] = failed.failure
