"""The gate as a process: what it loads, what it says, how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from gate.fake_engine import STEADY
from gate.link import Service, running_gate, submit
from penstock.rpc.errors import RpcError
from penstock.rpc.stubs import SchedulerStub
from penstock.scheduler.gate.tokenizer import PIECE_BYTES, TokenizerError, TokenizerFiles, digest
from penstock.v1 import ErrorReason, GetTokenizerRequest, SchedulerServiceLoadAdapterRequest


def gate_main(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "penstock.scheduler.gate.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ((), 2, "--model"),
        (("MODEL", "--block-tokens", "0"), 2, "--block-tokens"),
        (("MODEL", "--grpc-address", "somewhere"), 2, "somewhere"),
        (("MODEL", "--grpc-address", "0.0.0.0:0"), 2, "0.0.0.0"),
        (("MODEL", "--client-ca", "ca.pem"), 2, "client_ca"),
        (("MODEL", "--otlp-endpoint", "http://"), 2, "otlp_endpoint"),
        (("MODEL", "--executor", "quantum"), 2, "quantum"),
        (("/nowhere",), 1, "/nowhere/tokenizer.json"),
        (("MODEL", "--grpc-address", "192.0.2.1:1", "--allow-plaintext"), 1, "192.0.2.1:1"),
    ],
)
def test_a_bad_start_is_one_line(tmp_path: Path, arguments: tuple[str, ...], code: int, named: str) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    done = gate_main(*(str(tmp_path) if part == "MODEL" else part for part in arguments), "--log-level", "error")
    assert done.returncode == code, done.stderr
    *transport, line = done.stderr.strip().splitlines()
    assert named in line
    assert not transport or "add_port.cc" in transport[0], "of what is ours it is one line"


def test_a_model_that_cannot_be_loaded_ends_the_gate_with_the_engines_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("[1]")
    done = gate_main(str(tmp_path), "--executor", "simulated", "--grpc-address", "127.0.0.1:0", "--log-level", "error")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "config.json" in line


def test_the_configuration_is_printed(tmp_path: Path) -> None:
    done = gate_main(str(tmp_path), "--print-config", "--max-waiting", "7")
    assert done.returncode == 0
    assert '"max_waiting"' in done.stdout


# ---- the tokenizer ----


def test_the_digest_is_the_services(tmp_path: Path) -> None:
    files = pytest.importorskip("penstock.service.text.files")
    contents = {"tokenizer.json": b"{}", "chat_template.jinja": "é".encode(), "special_tokens_map.json": b""}
    assert digest(contents) == files.digest(contents)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "vocab.txt").write_text("not handed out")
    ours, theirs = TokenizerFiles.read(tmp_path), files.TokenizerFiles.from_directory(tmp_path)
    assert ours.digest == theirs.digest
    assert dict(ours.contents) == dict(theirs.contents)


def test_a_tokenizer_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        TokenizerFiles.read(tmp_path)


async def test_the_tokenizer_is_fetched_in_pieces(tmp_path: Path) -> None:
    large = bytes(range(256)) * 3000
    (tmp_path / "chat_template.jinja").write_bytes(large)
    (tmp_path / "special_tokens_map.json").write_bytes(b"")
    async with running_gate(tmp_path) as gate, gate.stub() as stub, Service(gate.address) as service:
        wanted = (await service.connect()).tokenizer_digest
        got: dict[str, bytes] = {}
        async for piece in stub.get_tokenizer(GetTokenizerRequest(digest=wanted), timeout=5):
            assert len(piece.data) <= PIECE_BYTES
            got[piece.name] = got.get(piece.name, b"") + piece.data
        assert got["chat_template.jinja"] == large
        assert digest(got) == wanted
        with pytest.raises(RpcError) as caught:
            await stub.get_tokenizer(GetTokenizerRequest(digest="other"), timeout=5).read()
        assert caught.value.reason == ErrorReason.TOKENIZER_NOT_FOUND


async def test_what_is_not_built_says_so(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, gate.stub() as stub:
        assert isinstance(stub, SchedulerStub)
        with pytest.raises(RpcError) as caught:
            await stub.load_adapter(SchedulerServiceLoadAdapterRequest(name="a"), timeout=5)
        assert caught.value.reason == ErrorReason.UNSUPPORTED_METHOD


async def test_the_status_counts(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=3))
        await service.until(lambda: handle in service.finished, "end")
        seen = await gate.until(lambda seen: seen.steps == 1, "submitted")
        assert (seen.sessions, seen.attempts) == (1, 1)
        assert seen.engine_pid == gate.gate.engine.pid
        assert seen.gate_pid not in (0, seen.engine_pid)
        assert seen.replica == gate.address
