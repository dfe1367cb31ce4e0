"""What this machine can do at most: ``python -m penstock.local.measure.ceilings DEVICE`` prints one JSON line.

A process of its own, so that nothing of it is left when the engine takes the memory.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

import msgspec
import torch

_REPEATS: Final = 7
_SIZES: Final = {"cuda": (1 << 30, 65_536, 8_192), "cpu": (1 << 24, 4_096, 768)}
"""Elements copied; rows of a matrix times a vector; size of a matrix product."""


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """Measured with 16-bit elements on a GPU, 32-bit ones on a CPU."""

    device: str
    copy_bytes_s: float
    """A copy, bytes read plus bytes written."""
    read_bytes_s: float
    """How fast weights can be read: the library's large matrix times a vector, or a copy if that is faster."""
    flop_s: float
    """A large matrix product."""
    torch_version: str
    triton_version: str | None
    driver: str | None


def measure_apart(device: str) -> Ceilings:
    """Measure in a process of its own. Raises RuntimeError with its last line if that fails."""
    command = [sys.executable, "-m", "penstock.local.measure.ceilings", device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return msgspec.json.decode(done.stdout, type=Ceilings)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of a few runs, warmed up."""
    times = []
    for _ in range(_REPEATS + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def measure(name: str) -> Ceilings:
    """Measure on this device: "auto", "cpu", "cuda" or "cuda:N"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    elements, rows, size = _SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.randn(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    matrix, vector = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((rows, size), (size,)))
    read = max(copy, matrix.nbytes / _seconds(lambda: torch.mv(matrix, vector), device))
    square = torch.randn(size, size, dtype=dtype, device=device)
    flop = 2 * size**3 / _seconds(lambda: torch.mm(square, square), device)
    return Ceilings(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        copy_bytes_s=copy,
        read_bytes_s=read,
        flop_s=flop,
        torch_version=str(torch.__version__),
        triton_version=_triton_version(),
        driver=_driver() if device.type == "cuda" else None,
    )


def _triton_version() -> str | None:
    try:
        import triton
    except ModuleNotFoundError:
        return None
    version: str = triton.__version__
    return version


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 else None


if __name__ == "__main__":
    print(json.dumps(msgspec.to_builtins(measure(sys.argv[1]))))
