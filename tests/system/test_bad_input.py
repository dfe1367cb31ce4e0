"""What a client can do wrong, over the whole path: a typed error, at once, and nobody else is hurt."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock.rpc.errors import RpcError
from penstock.v1 import (
    Chat,
    ErrorReason,
    GenerateRequest,
    Sampling,
    StreamRequest,
    TokenIds,
)
from support.clients import caller, collect, request
from support.stack import Stack, stack
from support.tiny_llama import build_tiny_llama

CODE = grpc.StatusCode
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", tokenizer=True)


@pytest.fixture(scope="module")
def roles(model: Path) -> Iterator[Stack]:
    with stack(
        model, executor="simulated", step_us=2000, max_sequences=2, max_waiting=4, max_model_tokens=256
    ) as started:
        yield started


def generate(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"text": "x", **fields})


REFUSED = {
    "unknown model": (generate(model="nobody"), CODE.NOT_FOUND, ErrorReason.MODEL_NOT_FOUND, set()),
    "unknown adapter": (generate(adapter="nobody"), CODE.NOT_FOUND, ErrorReason.ADAPTER_NOT_FOUND, set()),
    "no input": (GenerateRequest(), CODE.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST, {"input"}),
    "no ids": (
        GenerateRequest(token_ids=TokenIds()),
        CODE.INVALID_ARGUMENT,
        ErrorReason.INVALID_REQUEST,
        {"token_ids"},
    ),
    "no turns": (GenerateRequest(chat=Chat()), CODE.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST, {"chat.messages"}),
    "ids out of range": (
        GenerateRequest(token_ids=TokenIds(ids=[1, 320])),
        CODE.INVALID_ARGUMENT,
        ErrorReason.INVALID_REQUEST,
        {"token_ids"},
    ),
    "prompt too long": (generate(text="x" * 300), CODE.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST, {"text"}),
    "every bad sampling value": (
        generate(sampling=Sampling(temperature=float("nan"), top_p=0.0, top_k=0, max_tokens=0, stop=[""])),
        CODE.INVALID_ARGUMENT,
        ErrorReason.INVALID_REQUEST,
        {"sampling.temperature", "sampling.top_p", "sampling.top_k", "sampling.max_tokens", "sampling.stop"},
    ),
    "what is not built": (
        generate(priority=3, logprobs=0, sampling=Sampling(n=2, min_p=0.1)),
        CODE.UNIMPLEMENTED,
        ErrorReason.UNSUPPORTED_FIELD,
        {"priority", "logprobs", "sampling.n", "sampling.min_p"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_it_is_refused_by_name(roles: Stack, name: str) -> None:
    bad, code, reason, fields = REFUSED[name]
    async with caller(roles.address) as stubs:
        for call in (
            lambda: stubs.generation.generate(bad, timeout=5),
            lambda: stubs.generation.stream(StreamRequest(request=bad), timeout=5).read(),
        ):
            with pytest.raises(RpcError) as caught:
                await call()
            error = caught.value
            assert (error.code, error.reason) == (code, reason)
            named = {field.split("[")[0] for field, _ in error.violations}
            assert fields <= named or any(field.startswith(tuple(fields)) for field in named), named


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"])
async def test_malformed_bytes(roles: Stack, garbage: bytes) -> None:
    async with grpc.aio.insecure_channel(roles.address) as channel:
        generate: Any = channel.unary_unary("/penstock.v1.GenerationService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(garbage, timeout=5)
        assert caught.value.code() is CODE.INVALID_ARGUMENT


async def test_a_full_queue_is_said_at_once_and_when_to_come_back(roles: Stack) -> None:
    async with caller(roles.address) as stubs:
        answers = await asyncio.gather(
            *(collect(stubs, request([5] * 20, max_tokens=100, ignore_eos=True)) for _ in range(20)),
            return_exceptions=True,
        )
    refused = [answer for answer in answers if isinstance(answer, RpcError)]
    served = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(refused) + len(served) == 20
    assert len(served) >= 4
    assert refused
    for error in refused:
        assert (error.code, error.reason) == (CODE.RESOURCE_EXHAUSTED, ErrorReason.QUEUE_FULL)
        assert error.retry_after_s
    assert all(len(ids) == 100 for ids, _ in served)


async def test_a_deadline_that_passes(roles: Stack) -> None:
    async with caller(roles.address) as stubs:
        with pytest.raises(RpcError) as caught:
            await collect(stubs, request([5] * 20, max_tokens=200, ignore_eos=True), timeout_s=0.1)
        assert caught.value.code is CODE.DEADLINE_EXCEEDED
        assert len((await collect(stubs, request([5] * 20, max_tokens=3, ignore_eos=True)))[0]) == 3


async def test_garbage_on_any_port_hurts_nobody(roles: Stack) -> None:
    async with caller(roles.address) as stubs:
        neighbour = asyncio.create_task(collect(stubs, request([5] * 20, max_tokens=200, ignore_eos=True)))
        await asyncio.sleep(0.05)
        for address in (roles.service.address, roles.scheduler.address):
            host, _, port = address.rpartition(":")
            for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4096, PREFACE + b"\xff" * 999):
                with socket.create_connection((host, int(port)), timeout=5) as connection:
                    connection.sendall(garbage)
        async with grpc.aio.insecure_channel(roles.scheduler.address) as channel:
            for garbage in (b"\xff" * 50, b"", b"\x12\x03\x0a\x01x"):
                call: Any = channel.stream_stream("/penstock.v1.SchedulerService/Connect")(timeout=5)
                await call.write(garbage)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() in (CODE.INVALID_ARGUMENT, CODE.FAILED_PRECONDITION)
        ids, _ = await neighbour
        assert len(ids) == 200
    assert roles.service.process.poll() is None
    assert roles.scheduler.process.poll() is None


async def test_no_scheduler(roles: Stack) -> None:
    from support.stack import service

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    with service([address]) as lonely:
        async with caller(lonely.address) as stubs:
            with pytest.raises(RpcError) as caught:
                await collect(stubs, request("x", max_tokens=3))
            assert caught.value.code is CODE.UNAVAILABLE
            assert caught.value.reason is ErrorReason.NO_SCHEDULER
            assert caught.value.retry_after_s


def broken(folder: Path, how: str) -> Path:
    build_tiny_llama(folder, tokenizer=True)
    weights = folder / "model.safetensors"
    match how:
        case "missing":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "header":
            weights.write_bytes((1 << 60).to_bytes(8, "little") + weights.read_bytes()[8:])
        case "pickled":
            weights.rename(folder / "pytorch_model.bin")
        case "shape":
            config = (folder / "config.json").read_text()
            (folder / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 64'))
        case "tokenizer":
            (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("missing", "model.safetensors"),
        ("truncated", "model.safetensors"),
        ("header", "model.safetensors"),
        ("pickled", "pytorch_model.bin"),
        ("shape", "down_proj"),
        ("tokenizer", "tokenizer.json"),
    ],
)
def test_a_bad_checkpoint_ends_the_process_with_one_line(tmp_path: Path, how: str, named: str) -> None:
    folder = broken(tmp_path / "model", how)
    command = [sys.executable, "-m", "penstock.local.main", "scheduler", str(folder), "--grpc-address", "127.0.0.1:0"]
    done = subprocess.run([*command, "--log-level", "error"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert named in lines[0]
