"""The roles and how their processes are run. They are started, never imported."""

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

SERVICE = "service"
SCHEDULER = "scheduler"
MODULES: Mapping[str, str] = MappingProxyType(
    {SERVICE: "penstock.service.main", SCHEDULER: "penstock.scheduler.gate.main"}
)


def role_command(module: str, argv: Sequence[str]) -> list[str]:
    """The command that runs a role's module, without the working directory on its import path (-P)."""
    return [sys.executable, "-P", "-m", module, *argv]
