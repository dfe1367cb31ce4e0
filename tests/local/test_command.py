"""The `penstock` command from outside: help, mistakes, and finding a running `serve`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.local import state


def penstock(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return subprocess.run(
        [sys.executable, "-m", "penstock.local.main", *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_lists_the_commands() -> None:
    done = penstock("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("serve", "generate", "trace", "demo", "tune", "service", "scheduler"):
        assert f"\n  {command} " in done.stdout


def test_no_command_shows_the_help() -> None:
    done = penstock()
    assert done.returncode == 2
    assert "usage: penstock COMMAND" in done.stdout


def test_the_version() -> None:
    done = penstock("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("penstock 0.")


@pytest.mark.parametrize("command", ["serve", "generate", "trace", "demo", "tune", "service"])
def test_each_command_has_help(command: str) -> None:
    done = penstock(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--set KEY=VALUE" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bake"], "unknown command 'bake'"),
        (["serve", "--nope"], "unknown flag --nope"),
        (["serve", "--grpc-adress", "x"], "did you mean --grpc-address?"),
        (["serve", "--executor", "magic"], "expected one of auto, multiprocess, uniproc, simulated"),
        (["serve", "a", "b"], "MODEL_DIR is given twice"),
        (["serve", "--set", "nonsense"], "expected key=value"),
        (["generate"], "--text is required"),
        (["generate", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "x", "--max-tokens", "many"], "expected a whole number"),
        (["trace", "xyz"], "expected 32 hexadecimal digits"),
        (["demo", "extra"], "unexpected argument 'extra'"),
        (["service", "--nope"], "unknown flag --nope"),
        (["tune"], "--model-dir is required"),
        (["tune", "x", "--rows", "1,two"], "rows '1,two': must be numbers separated by commas"),
        (["tune", "x", "--seconds", "0"], "--seconds"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    done = penstock(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_tuning_wants_a_gpu() -> None:
    done = penstock("tune", "x", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: device 'cuda' ")
    assert "0 CUDA devices were found" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("generate", "x"), ("trace",)])
def test_nothing_is_running(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = penstock(*command, XDG_STATE_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no `penstock serve` is running: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("generate", "x", "--timeout", "5"), ("trace",)])
def test_a_serve_that_does_not_answer(tmp_path: Path, command: tuple[str, ...]) -> None:
    entry = state.ServeState(
        pid=os.getpid(),
        started_ticks=state.started_ticks(os.getpid()) or 0,
        grpc_address="127.0.0.1:1",
        trace_address="127.0.0.1:1",
        model="m",
    )
    state.write(entry, tmp_path / "penstock" / "serve.json")
    done = penstock(*command, XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [("--help",), ("generate", "--help"), ("generate", "--print-config", "x")])
def test_output_that_cannot_be_written_is_one_line(words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "penstock.local.main", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_a_reader_who_has_left_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "penstock.local.main", "--help"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_standard_output_nothing_is_said() -> None:
    run = 'exec "$0" -m penstock.local.main --help >&-'
    done = subprocess.run(["sh", "-c", run, sys.executable], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("command", "flag"), [(("generate", "x"), "--address"), (("trace",), "--receiver")])
def test_the_hint_names_a_flag_that_the_command_has(tmp_path: Path, command: tuple[str, ...], flag: str) -> None:
    assert penstock(*command, XDG_STATE_HOME=str(tmp_path)).stderr.endswith(f"or name one with {flag}\n")
    assert f" {flag} " in penstock(command[0], "--help").stdout


def test_a_key_that_no_header_can_carry() -> None:
    done = penstock("generate", "x", "--api-key", "a\nb", "--address", "127.0.0.1:1")
    assert (done.returncode, done.stderr) == (2, "error: api_key has characters that no header can carry\n")
