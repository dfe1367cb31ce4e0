"""The `penstock` command: which of its words does what."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import NoReturn

from penstock.config import ConfigError, run_or_exit
from penstock.local import console
from penstock.local.roles import MODULES, role_command
from penstock.local.state import NotRunning

_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "serve": "penstock.local.serve",
        "generate": "penstock.local.generate",
        "trace": "penstock.local.trace",
        "demo": "penstock.local.demo",
        "bench": "penstock.local.measure.main",
        "tune": "penstock.local.tune",
    }
)

_HELP = """\
usage: penstock COMMAND [arguments]

commands:
  serve [MODEL_DIR]   start every role on this machine and stay up
  generate TEXT       stream one completion to the terminal
  trace [TRACE_ID]    draw a request's trace, the latest without an id
  demo                serve, generate, trace and stop, in one go
  bench throughput    how fast a model is here, and how fast it could be; also: bench latency
  tune MODEL_DIR      measure how a model's steps of few rows are best computed on this GPU
  service             start one service
  scheduler           start one scheduler with its engine

penstock COMMAND --help tells more. penstock --version prints the version."""


def main() -> NoReturn:
    """Run the command line of this process."""
    run_or_exit(lambda: console.run(lambda: run(sys.argv[1:])))


def run(argv: Sequence[str]) -> int:
    """Run one command line; its exit code. Raises ConfigError for one that cannot be understood."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_HELP)
        return 0 if argv else 2
    command, *rest = argv
    if command == "--version":
        print(f"penstock {metadata.version('penstock')}")
        return 0
    if command in MODULES:
        words = role_command(MODULES[command], rest)
        os.execv(words[0], words)
    if command not in _COMMANDS:
        raise ConfigError(f"unknown command {command!r}; penstock --help lists them")
    return _run(command, rest)


def _run(command: str, rest: Sequence[str]) -> int:
    try:
        code: int = importlib.import_module(_COMMANDS[command]).main(rest)
    except NotRunning as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "penstock").partition(".")[0] == "penstock":
            raise
        raise ConfigError(f"{command} needs {error.name}: install penstock[all]") from error
    return code


if __name__ == "__main__":
    main()
