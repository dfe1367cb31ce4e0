"""What importing a role maps into its process: no torch where nothing is computed, no Rust in gate and engine."""

import json
import subprocess
import sys
from typing import TypedDict

import pytest

PROGRAM = """
import importlib, json, mmap, sys

for name in sys.argv[1:]:
    importlib.import_module(name)

def is_rust(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"/rustc/") >= 0 or content.find(b"rust_eh_personality") >= 0

with open("/proc/self/maps") as maps:
    mapped = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
print(json.dumps({"modules": sorted(sys.modules), "rust": sorted(filter(is_rust, mapped))}))
"""

GATE = ("penstock.scheduler.gate.main",)
ENGINE = ("penstock.scheduler.engine.main", "penstock.executor.simulated")
CORE = ("penstock.scheduler.core.planner", "penstock.scheduler.core.policies.fcfs")
SERVICE = ("penstock.service.main",)
CLIENT = ("penstock.client",)
COMMAND = ("penstock.local.main", "penstock.local.serve", "penstock.local.generate", "penstock.local.demo")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")


class Loaded(TypedDict):
    """What a process has loaded."""

    modules: list[str]
    rust: list[str]


def load(*modules: str) -> Loaded:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *modules], capture_output=True, text=True, timeout=60, check=True
    )
    answer: Loaded = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("modules", [GATE, ENGINE, CORE, SERVICE, CLIENT, COMMAND], ids=lambda modules: modules[0])
def test_no_torch(modules: tuple[str, ...]) -> None:
    tops = {name.partition(".")[0] for name in load(*modules)["modules"]}
    assert not tops & {"torch", "transformers", "triton", "safetensors"}


@pytest.mark.parametrize("modules", [GATE, ENGINE, CORE, CLIENT], ids=lambda modules: modules[0])
def test_no_rust(modules: tuple[str, ...]) -> None:
    assert load(*modules)["rust"] == []


def test_rust_would_be_seen() -> None:
    assert any("tokenizers" in path for path in load("tokenizers")["rust"])


def test_the_engine_loads_no_server_and_no_exporter() -> None:
    tops = {name.partition(".")[0] for name in load(*ENGINE)["modules"]}
    assert not tops & {"grpc", "opentelemetry", "betterproto2", "tokenizers"}
