"""`penstock serve`, `generate`, `trace` and `demo` as a person uses them: real roles, the model that is shipped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from penstock.client import Client

START_S = 90.0
ENGINE, GATE, SERVE, SERVICE = (f"penstock-{role}"[:15] for role in ("engine", "gate", "serve", "service"))
"""Linux keeps 15 bytes of a process's name."""

READY = re.compile(r"ready grpc=(\S+) model=(\S+) pid=(\d+)\n")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "penstock.local.main", *arguments]


class Serve:
    """A running `penstock serve` with a state folder of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        self.environment = {**kept, "XDG_STATE_HOME": str(folder)}
        self.state_file = folder / "penstock" / "serve.json"
        self.errors = folder / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command("serve", "--grpc-address", "127.0.0.1:0", *arguments),
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = READY.fullmatch(line)
        assert found is not None, line + self.errors.read_text()
        self.address, self.model, pid = found.groups()
        assert int(pid) == self.process.pid
        self.hint = self.process.stdout.readline()
        self.roles = psutil.Process(self.process.pid).children(recursive=True)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*arguments), env=self.environment, capture_output=True, text=True, timeout=60)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=30)
        return self.process.returncode

    def left_behind(self) -> list[psutil.Process]:
        _, alive = psutil.wait_procs(self.roles, timeout=5)
        return alive

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate(timeout=10)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    running = Serve(tmp_path_factory.mktemp("serve"), "--set", "max_sequences=4")
    yield running
    running.close()


@pytest.mark.timeout(180)
def test_the_roles_are_processes_with_names(serve: Serve) -> None:
    assert sorted(role.name() for role in serve.roles) == [ENGINE, GATE, SERVICE]
    assert "penstock generate" in serve.hint
    assert "penstock trace" in serve.hint


def test_the_state_file_tells_where(serve: Serve) -> None:
    told = json.loads(serve.state_file.read_text())
    assert (told["grpc_address"], told["model"], told["pid"]) == (serve.address, serve.model, serve.process.pid)


def test_generate_then_trace(serve: Serve) -> None:
    done = serve.run("generate", "def add(a, b):\n", "--max-tokens", "12", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def add(a, b):\n")
    assert len(done.stdout) > len("def add(a, b):\n\n")
    facts = re.fullmatch(r"(\d+) tokens · (LENGTH|STOP) · .* · see: penstock trace ([0-9a-f]{32})\n", done.stderr)
    assert facts is not None, done.stderr
    time.sleep(0.5)  # the roles send their spans every quarter of a second
    for asked in ([], [facts[3]]):
        drawn = serve.run("trace", *asked)
        assert drawn.returncode == 0, drawn.stderr
        for part in (facts[3], "penstock.client/Stream", "GenerationService/Stream", "scheduler.request", "decode"):
            assert part in drawn.stdout, drawn.stdout


def test_an_unknown_trace_is_one_line(serve: Serve) -> None:
    done = serve.run("trace", "0" * 31 + "1")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_an_error_of_the_service_is_one_line(serve: Serve) -> None:
    done = serve.run("generate", "x", "--model-name", "nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: NOT_FOUND: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_who_leaves_is_no_error(serve: Serve) -> None:
    arguments = ["generate", "def add(a, b):\n", "--max-tokens", "64", "--temperature", "0"]
    pipeline = subprocess.Popen(
        command(*arguments), env=serve.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert pipeline.stdout is not None
    assert pipeline.stderr is not None
    pipeline.stdout.close()
    said = pipeline.stderr.read()
    assert (pipeline.wait(30), said) == (0, b"")
    pipeline.stderr.close()


def test_the_python_client_of_the_readme(serve: Serve) -> None:
    with Client(serve.address, timeout_s=30) as client:
        with client.stream("def fibonacci(n):", max_tokens=8, temperature=0) as stream:
            text = "".join(chunk.text for chunk in stream)
        assert text == stream.completion.text != ""
        assert stream.completion.usage.completion_tokens <= 8
        chat = [{"role": "user", "content": "Write a function that reverses a list."}]
        assert client.generate(chat, seed=7, max_tokens=8).seed == 7
        ids = client.tokenize("def f(x):")
        assert client.detokenize(ids) == "def f(x):"
        assert [model.name for model in client.models()] == [serve.model]


@pytest.mark.timeout(180)
def test_generate_to_where_nothing_can_be_written_is_one_line(serve: Serve) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("generate", "def add(a, b):\n", "--max-tokens", "4", "--address", serve.address),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_text_that_the_terminal_does_not_know_is_replaced(serve: Serve) -> None:
    done = subprocess.run(
        command("generate", "# \N{GREEK SMALL LETTER ALPHA}", "--max-tokens", "1", "--address", serve.address),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# ?")


def test_sigterm_drains_and_leaves_nothing(serve: Serve) -> None:
    assert serve.end(signal.SIGTERM) == 0
    assert serve.left_behind() == []
    assert not serve.state_file.exists()
    assert serve.errors.read_text() == ""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", [SERVE, GATE, ENGINE, SERVICE])
def test_kill_9_leaves_nothing(tmp_path: Path, victim: str) -> None:
    serve = Serve(tmp_path, "--executor", "simulated")
    processes = {role.name(): role for role in serve.roles} | {SERVE: psutil.Process(serve.process.pid)}
    try:
        processes[victim].kill()
        serve.process.communicate(timeout=20)
        assert serve.process.returncode == (-signal.SIGKILL if victim == SERVE else 1)
        assert serve.left_behind() == []
        if victim != SERVE:
            assert "error: the " in serve.errors.read_text()
            assert not serve.state_file.exists()
    finally:
        serve.close()


def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command("serve", str(tmp_path / "nothing"), "--grpc-address", "127.0.0.1:0"),
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "nothing" in done.stderr


def test_an_unknown_key_is_one_line() -> None:
    done = subprocess.run(command("serve", "--set", "max_sequence=4"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --set max_sequence: no role knows this key (did you mean max_sequences?)\n"


def test_a_bad_value_of_a_role_is_one_line() -> None:
    done = subprocess.run(command("serve", "--set", "max_sequences=no"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --set max_sequences: expected a whole number, got 'no'\n"


def test_the_resolved_settings_of_all_roles() -> None:
    arguments = ["serve", "--set", "max_sequences=4", "--log-level", "error", "--print-config"]
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=True)
    shown = json.loads(done.stdout)
    assert set(shown) == {"serve", "service", "scheduler"}
    assert shown["scheduler"]["max_sequences"] == {"value": 4, "origin": "flag"}
    assert shown["service"]["log_level"] == {"value": "error", "origin": "flag"}
    assert shown["serve"]["log_level"] == {"value": "error", "origin": "flag"}
    assert shown["serve"]["executor"]["origin"] == "default"


@pytest.mark.timeout(180)
def test_the_demo() -> None:
    arguments = ["demo", "--prompt", "import os\n", "--max-tokens", "16"]
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 0, done.stderr
    text, _, drawing = done.stdout.partition("\ntrace ")
    assert text.startswith("import os\n")
    pids = set(re.findall(r"(?:client|service|gate|engine) (\d+)", drawing))
    assert len(pids) >= 4, done.stdout
    assert not [process for pid in pids if (process := _alive(int(pid)))]


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid)
