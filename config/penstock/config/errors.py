"""The one way in which a configuration is refused."""

import sys
from collections.abc import Callable
from typing import NoReturn


class ConfigError(Exception):
    """A configuration that cannot be used; the message, one line, names the flag or variable and why."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def run_or_exit(main: Callable[[], int | None]) -> NoReturn:
    """Run a process's main and exit with what it returns; a ConfigError is one line on stderr and code 2."""
    try:
        code = main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)
