"""What every benchmark records beside its figures: the machine, the versions, the commit."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("betterproto2", "grpcio", "msgspec", "numpy", "protobuf", "tokenizers", "torch", "triton")


_WRITTEN = ("bench/results", "docs/performance.md")
"""What benchmarks and the table made of them change themselves."""


def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": os.environ.get("PENSTOCK_COMMIT") or _git("rev-parse", "HEAD"),
        "uncommitted": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *(f":!/{path}" for path in _WRITTEN))
        ),
    }


def percentile(samples: list[float], share: float) -> float:
    """The smallest sample that at least that share of them does not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write figures and environment to ``results/NAME.json``, and print where."""
    path = _RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "environment": environment(), **figures}, indent=1) + "\n")
    print(f"written to {path}")
    return path


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _gpu() -> str | None:
    """Name, driver and power limit of the first GPU; None: there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_RESULTS, capture_output=True, text=True, check=False)
    return done.stdout.strip()
