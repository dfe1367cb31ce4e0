"""What every role does as a process: live no longer than its parent, carry a name, say when it is ready."""

import ctypes
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Final

from penstock.config.errors import ConfigError

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends (prctl(2), PR_SET_PDEATHSIG; Linux).

    ``parent_pid`` is the parent's process id as the parent knows it: if it has ended already, this process exits.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)


def exit_with_parent(parent_pid: int) -> None:
    """End this process when its parent ends, by a thread that waits for that (pidfd_open(2); Linux).

    For a process that is started by a thread that ends before its parent does: the kernel would take the end of that
    thread for the parent's (:func:`die_with_parent`). If the parent has ended already, this process exits.
    """
    try:
        parent = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        sys.exit(1)
    if os.getppid() != parent_pid:
        sys.exit(1)

    def watch() -> None:
        select.select([parent], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def set_process_name(name: str) -> None:
    """Name this process in ``ps`` and ``pstree``; at most 15 bytes are kept (prctl(2), PR_SET_NAME; Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])


def check_ready_fd(fd: int | None) -> None:
    """Call it before anything is opened. Raises ConfigError if ``fd`` was not inherited: it would be another file's."""
    if fd is None:
        return
    try:
        os.fstat(fd)
    except OSError:
        raise ConfigError(f"ready_fd: descriptor {fd} is not open") from None


def report_ready(fd: int, facts: Mapping[str, str | int]) -> None:
    """Write ``facts`` as one JSON line to a descriptor that the parent reads, and close it."""
    with os.fdopen(fd, "w") as pipe:
        pipe.write(json.dumps(dict(facts)) + "\n")
