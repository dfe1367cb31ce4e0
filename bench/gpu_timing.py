"""Times of work on a GPU, what that GPU reaches, and how a figure is told: what bench/kernels/ has in common."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from record import environment

REPEATS, REPLAYS = 7, 3


def graph_us(work: Callable[[], object], calls: int = 1) -> list[float]:
    """Microseconds of one of the ``calls`` of which ``work`` is made, replayed from a CUDA graph, REPEATS times."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    samples = []
    for _ in range(REPEATS):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        graph.replay()
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        samples.append(1000 * begin.elapsed_time(end) / REPLAYS / calls)
    return samples


def graph_s(work: Callable[[], object], calls: int = 1) -> float:
    """The median of the same in seconds."""
    return 1e-6 * statistics.median(graph_us(work, calls))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.randn(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_s(lambda: torch.add(source, 0, out=target))


def read_rate() -> float:
    """Bytes a second at which a matrix-vector product reads a matrix of 1 GiB."""
    matrix = torch.randn(65_536, 8192, dtype=torch.bfloat16, device="cuda")
    vector = torch.randn(8192, dtype=torch.bfloat16, device="cuda")
    return matrix.nbytes / graph_s(lambda: torch.mv(matrix, vector))


def product_rate() -> float:
    """Multiplications and additions a second of a product of bfloat16 matrices of 8,192 rows and columns."""
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return 2 * 8192**3 / graph_s(lambda: torch.mm(square, square))


class Report:
    """One JSON line a figure, to standard output and to a file; the first one says where and of what it is."""

    def __init__(self, benchmark: str, out: Path | None, **ceilings: float) -> None:
        """Append to ``out``, if it is given. ``ceilings``: what this GPU reaches, by name."""
        self._out = out
        self(benchmark=benchmark, environment=environment(), ceilings=ceilings)

    def __call__(self, **figures: object) -> None:
        """Tell a figure."""
        line = json.dumps(figures)
        print(line, flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(line + "\n")
