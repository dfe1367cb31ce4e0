"""The client works with what the base install has: here every other distribution cannot be imported."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import importlib.machinery, json, sys

allowed = set(json.load(sys.stdin))

class BaseInstall(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if spec is not None and spec.origin and "site-packages" in spec.origin and spec.origin not in allowed:
            raise ModuleNotFoundError(f"{name} is not in the base install", name=name)
        return spec

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = BaseInstall
for blocked in ("torch", "structlog", "grpc_health", "opentelemetry.sdk.trace"):
    try:
        __import__(blocked)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{blocked} is not blocked")

import penstock.client
with penstock.client.Client("127.0.0.1:1", timeout_s=5) as client:
    try:
        client.generate("x")
    except penstock.client.RpcError as error:
        print(error.code.name)
"""


def test_the_client_needs_the_base_install_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [str(path) for name in closure(project["dependencies"]) for path in files_of(name)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(files), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "UNAVAILABLE\n")


def closure(requirements: Iterable[str]) -> set[str]:
    """The distributions that an installer brings for these requirements, without extras."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = re.split(r"[<>=~!;\s\[(]", requirement, maxsplit=1)[0]
        if name not in found and "extra ==" not in requirement:
            found.add(name)
            waiting += distribution(name).requires or []
    return found


def files_of(name: str) -> Iterator[Path]:
    owner = distribution(name)
    return (Path(str(owner.locate_file(file))) for file in owner.files or ())
