"""The state file by which `penstock generate` and `penstock trace` find a running `penstock serve`."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

_HINT = "start one with `penstock serve`, or name one with {flag}"


class NotRunning(Exception):
    """No `penstock serve` of this user is running; the message, one line, says what to do."""


class ServeState(msgspec.Struct, frozen=True, kw_only=True):
    """What others need to know of a running `serve`."""

    pid: int
    started_ticks: int
    """When the process started, in clock ticks since boot: tells it from a later process with its id."""
    grpc_address: str
    trace_address: str
    model: str


def state_path(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_STATE_HOME/penstock/serve.json`; a relative XDG_STATE_HOME is ignored, as its specification says."""
    base = Path(environ.get("XDG_STATE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local" / "state") / "penstock" / "serve.json"


def write(state: ServeState, path: Path) -> None:
    """Put the state there in one move, readable for this user only. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # made with mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(state))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove(path: Path, pid: int) -> None:
    """Remove the file if it still speaks of process `pid`, not of a `serve` that was started later."""
    try:
        if msgspec.json.decode(path.read_bytes(), type=ServeState).pid == pid:
            path.unlink(missing_ok=True)
    except (OSError, msgspec.MsgspecError):
        return


def find(path: Path, *, flag: str = "--address") -> ServeState:
    """The running `serve`. Raises NotRunning if there is none or the file is left from one that ended.

    `flag` is how the caller's command lets one be named.
    """
    hint = _HINT.format(flag=flag)
    try:
        state = msgspec.json.decode(path.read_bytes(), type=ServeState)
    except FileNotFoundError:
        raise NotRunning(f"no `penstock serve` is running: {hint}") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise NotRunning(f"{path} cannot be read ({error}): {hint}") from None
    if started_ticks(state.pid) != state.started_ticks:
        raise NotRunning(f"the `penstock serve` of {path} (pid {state.pid}) has ended: {hint}")
    return state


def started_ticks(pid: int) -> int | None:
    """When a process started; None if there is none of that id. 0 where the system does not tell."""
    try:
        # The command's name, in parentheses, may hold anything; field 22 of proc(5) is the 20th behind it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return _started_without_proc(pid)


def _started_without_proc(pid: int) -> int | None:
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0
    return 0
