"""The product of rows and a weight: torch's, through the library that is the faster one for its shape.

cuBLAS and cuBLASLt choose different kernels for one and the same product, and neither choice is the better one
everywhere: for the batches of decode steps they differ by up to a tenth. :meth:`Products.tune` measures both as such a
step will meet them: replayed from a CUDA graph, one layer's weight after another, so that none is still in a cache.

A third way is to swap the operands, ``(W xᵀ)ᵀ``. At some sizes it wins about as much as it then costs to bring its
result, which is column-major, into the order that everything behind it reads.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

Shape = tuple[int, int, int]
"""Rows, outputs, inputs."""

WORTH: Final = 0.98
"""cuBLASLt is chosen if it takes at most this share of the time of torch's own choice."""
REPLAYS: Final = 4
COLD_BYTES: Final = 200 * 2**20
"""Weights of which each replay reads at least so much are not found in a cache: four times that of an H200."""


class Products:
    """Products of one model. Until tuned, and wherever tensors are not on a GPU, torch chooses."""

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self.prefer_lt: set[Shape] = set()
        """Where :meth:`tune` found cuBLASLt to be faster."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """``x Wᵀ + b``: [rows, inputs] · [outputs, inputs] → [rows, outputs], contiguous.

        ``out`` takes the result of a product without bias.
        """
        if self.prefer_lt and (x.shape[0], *weight.shape) in self.prefer_lt:
            with _lt():
                return _product(x, weight, bias, out)
        return _product(x, weight, bias, out)

    @torch.inference_mode()
    def tune(self, rows: Sequence[int], weights: Iterable[Tensor], *, limit_s: float) -> None:
        """Measure both libraries for each number of ``rows`` with each shape of ``weights``; the heaviest shape first.

        ``weights`` [outputs, inputs] each: those of all layers, all of one dtype, on one GPU; others are passed over.
        No capture may be going on. Ends early after ``limit_s`` seconds; what was not measured until then stays
        torch's choice. Of near-equals either may win, so that the last bits of a result can differ from run to run.
        """
        deadline = time.monotonic() + limit_s
        by_shape: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for weight in weights:
            if weight.is_cuda:
                by_shape[weight.shape[0], weight.shape[1]].append(weight)
        bench = _Bench()
        for shape, alike in sorted(by_shape.items(), key=lambda item: -len(item[1]) * item[1][0].numel()):
            some = alike[: 1 + COLD_BYTES // alike[0].nbytes]
            for count in rows:
                if time.monotonic() >= deadline:
                    return
                if bench.prefers_lt(count, some):
                    self.prefer_lt.add((count, *shape))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out)


@contextmanager
def _lt() -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


class _Bench:
    """Times products of weights that stand in for those of a step."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def prefers_lt(self, rows: int, weights: Sequence[Tensor]) -> bool:
        """Whether cuBLASLt is the faster one by enough, and agrees with the other."""
        x = torch.randn(rows, weights[0].shape[1], dtype=weights[0].dtype, device=weights[0].device)
        expected, taken = linear(x, weights[0]), self._replay_ms(x, weights)
        with _lt():
            return _agree(linear(x, weights[0]), expected) and self._replay_ms(x, weights) <= WORTH * taken

    def _replay_ms(self, x: Tensor, weights: Sequence[Tensor]) -> float:
        """Milliseconds for the products of ``x`` with all ``weights``: the best of a few replays."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            linear(x, weights[0])  # takes work space and chooses an algorithm: neither may happen while capturing
            # Not through torch.cuda.graph: that empties caches before each of many captures.
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for weight in weights:
                    linear(x, weight)
            finally:
                graph.capture_end()
            graph.replay()
            return min(_timed_ms(graph) for _ in range(REPLAYS))


def _timed_ms(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _agree(result: Tensor, expected: Tensor) -> bool:
    """Both are roundings of the same sums, taken in another order."""
    tolerance = 4 * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool(((result - expected).abs() <= tolerance).all())
