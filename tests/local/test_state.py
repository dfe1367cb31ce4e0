"""The state file: what is written is found, what is stale is not."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.local import state


def entry(pid: int, ticks: int) -> state.ServeState:
    return state.ServeState(
        pid=pid, started_ticks=ticks, grpc_address="127.0.0.1:1", trace_address="127.0.0.1:2", model="m"
    )


def own() -> state.ServeState:
    ticks = state.started_ticks(os.getpid())
    assert ticks is not None
    return entry(os.getpid(), ticks)


def test_what_is_written_is_found(tmp_path: Path) -> None:
    path = tmp_path / "new" / "serve.json"
    state.write(own(), path)
    assert state.find(path) == own()


def test_only_the_user_can_read_it_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "penstock" / "serve.json"
    state.write(own(), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_nothing_running(tmp_path: Path) -> None:
    with pytest.raises(state.NotRunning, match="no `penstock serve` is running"):
        state.find(tmp_path / "serve.json")


def test_a_dead_process_is_stale(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = state.started_ticks(child.pid)
    assert ticks is not None
    path = tmp_path / "serve.json"
    state.write(entry(child.pid, ticks), path)
    assert state.find(path).pid == child.pid
    child.communicate(b"\n", timeout=10)
    with pytest.raises(state.NotRunning, match=f"pid {child.pid}.*has ended"):
        state.find(path)


def test_another_process_with_the_same_id_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    state.write(entry(os.getpid(), own().started_ticks + 1), path)
    with pytest.raises(state.NotRunning, match="has ended"):
        state.find(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}'])
def test_garbage_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "serve.json"
    path.write_bytes(content)
    with pytest.raises(state.NotRunning, match="cannot be read") as caught:
        state.find(path)
    assert "\n" not in str(caught.value)


def test_removal_spares_the_file_of_a_later_serve(tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    state.write(own(), path)
    state.remove(path, os.getpid() + 1)
    assert path.exists()
    state.remove(path, os.getpid())
    assert not path.exists()
    state.remove(path, os.getpid())


def test_where_it_lies() -> None:
    home = Path.home() / ".local" / "state" / "penstock" / "serve.json"
    assert state.state_path({"XDG_STATE_HOME": "/x"}) == Path("/x/penstock/serve.json")
    assert state.state_path({}) == home
    assert state.state_path({"XDG_STATE_HOME": "relative"}) == home
