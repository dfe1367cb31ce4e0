"""A role as a child process: ready, failing, silent, draining, killed with all that it started."""

import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.local.role_process import Ready, RoleFailed, RoleProcess

PRELUDE = """
import json, os, signal, subprocess, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
def ready():
    with os.fdopen(int(flags["--ready-fd"]), "w") as pipe:
        pipe.write(json.dumps({"address": "127.0.0.1:7", "pid": os.getpid(), "role": "fake"}) + "\\n")
"""

Write = Callable[[str], str]


@pytest.fixture
def role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a role's module; gives its name."""
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *([inherited] if inherited else [])]))

    def write(body: str) -> str:
        (tmp_path / "fake_role.py").write_text(PRELUDE + textwrap.dedent(body))
        return "fake_role"

    return write


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


async def test_ready_then_drained(role: Write) -> None:
    module = role("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); ready(); time.sleep(60)")
    process = await RoleProcess.start("fake", module, [])
    assert await process.ready(20) == Ready("127.0.0.1:7", process.pid, "fake")
    assert await process.drain(10) is None
    assert gone(process.pid)


async def test_a_role_that_fails_at_start_has_said_why(role: Write, capfd: pytest.CaptureFixture[str]) -> None:
    process = await RoleProcess.start("fake", role("sys.exit('error: no such model')"), [])
    with pytest.raises(RoleFailed, match="exit code 1") as caught:
        await process.ready(20)
    assert caught.value.explained
    assert capfd.readouterr().err == "error: no such model\n"


async def test_a_role_that_dies_by_a_signal_is_told_of(role: Write) -> None:
    process = await RoleProcess.start("fake", role("os.kill(os.getpid(), signal.SIGKILL)"), [])
    with pytest.raises(RoleFailed, match="SIGKILL") as caught:
        await process.ready(20)
    assert not caught.value.explained


async def test_a_role_that_ends_later_is_not_taken_as_explained(role: Write) -> None:
    process = await RoleProcess.start("fake", role("ready(); sys.exit(1)"), [])
    await process.ready(20)
    failure = await process.ended()
    assert "exit code 1" in str(failure)
    assert not failure.explained


async def test_a_silent_role_is_late_and_killed(role: Write) -> None:
    module = role("signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)")
    process = await RoleProcess.start("fake", module, [])
    with pytest.raises(RoleFailed, match=r"not ready after 0\.5 s"):
        await process.ready(0.5)
    failure = await process.drain(0.5)
    assert failure is None or "did not drain" in str(failure)
    assert gone(process.pid)


async def test_stopped_before_it_was_ready_is_no_failure(role: Write) -> None:
    process = await RoleProcess.start("fake", role("time.sleep(60)"), [])
    assert await process.drain(10) is None


async def test_what_a_role_leaves_behind_is_killed(role: Write, tmp_path: Path) -> None:
    module = role(
        f"""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        ready()
        time.sleep(60)
        """
    )
    process = await RoleProcess.start("fake", module, [])
    await process.ready(20)
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    assert await process.drain(10) is None
    assert gone(child)


async def test_kill_reaches_the_whole_group(role: Write) -> None:
    process = await RoleProcess.start("fake", role("ready(); time.sleep(60)"), [])
    await process.ready(20)
    process.kill()
    failure = await process.ended()
    assert signal.SIGKILL.name in str(failure)
