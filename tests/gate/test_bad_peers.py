"""Whatever comes over a stream, it ends that stream at the most: the process and the neighbours go on."""

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from gate.fake_engine import STEADY, tokens
from gate.link import PROTOCOL, Service, read_to_end, running_gate, submit, u32
from penstock.rpc.channel import open_channel
from penstock.rpc.errors import RpcError
from penstock.v1 import Ack, Cancel, ConnectRequest, ErrorReason, Hello, ProtocolVersion, SubmitPart

CONNECT = "/penstock.v1.SchedulerService/Connect"
CODE = grpc.StatusCode


def hello(**fields: object) -> ConnectRequest:
    return ConnectRequest(hello=Hello(**{"session": os.urandom(16), "protocol": PROTOCOL, **fields}))  # type: ignore[arg-type]


BAD_BEGINNINGS = {
    "nothing": (ConnectRequest(), CODE.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST),
    "no hello": (ConnectRequest(submit=submit([1])), CODE.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST),
    "short session": (hello(session=b"x"), CODE.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST),
    "no column": (hello(handles=b"xyz", offsets=b"xyz"), CODE.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST),
    "columns of two lengths": (hello(handles=u32([1])), CODE.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST),
    "no protocol": (hello(protocol=None), CODE.FAILED_PRECONDITION, ErrorReason.PROTOCOL_MISMATCH),
    "a later major": (
        hello(protocol=ProtocolVersion(major=2)), CODE.FAILED_PRECONDITION, ErrorReason.PROTOCOL_MISMATCH,
    ),
    "a far minor": (
        hello(protocol=ProtocolVersion(major=1, minor=2)), CODE.FAILED_PRECONDITION, ErrorReason.PROTOCOL_MISMATCH,
    ),
}  # fmt: skip


async def test_bad_beginnings(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, gate.stub() as stub:
        for name, (first, code, reason) in BAD_BEGINNINGS.items():
            call = stub.connect()
            await call.write(first)
            with pytest.raises(RpcError) as caught:
                await call.read()
            assert (caught.value.code, caught.value.reason) == (code, reason), name
        call = stub.connect()
        await call.write(hello(protocol=ProtocolVersion(major=1, minor=1)))
        assert (await call.read()) is not None, "adjacent minors interoperate"
        call.cancel()
        await gate.until(lambda seen: seen.sessions == 0, "nothing is left")


BAD_WORDS = {
    "a second hello": hello(),
    "no column": ConnectRequest(ack=Ack(finished=b"x")),
    "columns of two lengths": ConnectRequest(ack=Ack(handles=u32([1]))),
}


@pytest.mark.parametrize("name", BAD_WORDS)
async def test_bad_words_end_the_stream(tmp_path: Path, name: str) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=200))
        await service.call.write(BAD_WORDS[name])
        await service.until(lambda: service.end is not None, "end")
        assert service.end is not None
        assert service.end.code is CODE.INVALID_ARGUMENT
        await service.disconnect()
        await service.connect([handle])
        await service.until(lambda: handle in service.finished, "end")
        assert service.ids[handle] == tokens([STEADY], 200)


async def test_what_is_not_known_is_passed_over(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        await service.say()
        await service.say(cancel=Cancel(attempt_id=b"nobody"))
        await service.say(submit_part=SubmitPart(attempt_id=b"nobody", index=1, prompt_ids=b"x"))
        await service.acknowledge({5: 3}, [9])
        handle = await service.submit(submit([STEADY], max_tokens=3))
        await service.until(lambda: handle in service.finished, "end")
        assert service.end is None


async def test_garbage_and_oversize_hurt_no_neighbour(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=600))
        async with open_channel(gate.address) as channel:
            welcome = bytes.fromhex("0a180a00") + b"\x12\x10" + os.urandom(16) + b"\x1a\x02\x08\x01"
            for garbage, code in (
                (b"\xff" * 50, CODE.INVALID_ARGUMENT),
                (b"\x12\x03\x0a\x05x", CODE.INVALID_ARGUMENT),
                (b"\x0a" + b"x" * (9 << 20), CODE.RESOURCE_EXHAUSTED),
            ):
                for beginning in (b"", welcome):
                    call: Any = channel.stream_stream(CONNECT)(timeout=5)
                    if beginning:
                        await call.write(beginning)
                        assert await call.read() is not grpc.aio.EOF
                    await call.write(garbage)
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await read_to_end(call)
                    assert caught.value.code() is code
        reader, writer = await asyncio.open_connection(*gate.address.split(":"))
        writer.write(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(5000))
        await reader.read(100)
        writer.close()
        await service.until(lambda: handle in service.finished, "the neighbour's end")
        assert service.ids[handle] == tokens([STEADY], 600)
        assert service.end is None
        await gate.until(lambda seen: seen.sessions == 1, "nothing else is left")
