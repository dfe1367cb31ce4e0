"""Standard output that may be closed, full, or left by its reader, and that may not know every character."""

import contextlib
import os
import sys
from collections.abc import Callable


def run(main: Callable[[], int]) -> int:
    """The exit code of `main`, all output written.

    Without a standard output what is printed goes nowhere. A reader who leaves (`| head`) has enough: code 0.
    A write or another operation of the system that fails is one line on stderr and code 1.
    """
    _prepare()
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        return 0
    except OSError as error:
        discard_output()
        print(f"error: {error}", file=sys.stderr)
        return 1


def discard_output() -> None:
    """From here on what is printed goes nowhere; nothing complains of it, the interpreter's last flush included."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def _prepare() -> None:
    if sys.stdout is None:  # its descriptor was closed before we started
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it lives as long as the process
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
