"""The product of rows and a weight: torch's, or the cuBLASLt algorithm that was measured to be the fastest one.

Torch takes what the library's heuristics put first. :meth:`Products.tune` measures their first few as steps will meet
them: one layer's weight after another, so that none is still in a cache, the launches queued so that none waits for
the host.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from penstock.executor.layers.cublaslt import Algorithm, CublasLt, CublasLtError, LtProduct

Shape = tuple[int, int, int]
"""Rows, outputs, inputs."""

WORTH: Final = 0.97
"""An algorithm is chosen if it takes at most this share of the time of torch's own choice."""
CANDIDATES: Final = 8
REPEATS: Final = 3
HOPELESS: Final = 1.1
"""An algorithm whose first repeat takes so much longer than the best so far is not repeated."""
COLD_BYTES: Final = 100 * 2**20
"""A product before whose next turn so much else is read and written is not found in a cache: twice that of an H200."""
LAUNCHES: Final = 8
"""Of a repeat, unless fewer already take the span: a single short launch would be as short as its uncertainty."""
SPAN_S: Final = 4e-4
"""Seconds of a repeat beside which what is uncertain about it is small."""
BYTES_A_SECOND: Final = 4e12
OPERATIONS_A_SECOND: Final = 7e14
"""About what an H200 reaches: they tell roughly how long a product will take."""
QUEUE_CYCLES: Final = 200_000
"""For about so many cycles of its clock the device is held up, so that launches are queued when it begins."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An algorithm for one shape."""

    product: LtProduct
    algorithm: Algorithm

    def run(self, x: Tensor, weight: Tensor, out: Tensor, *, add: bool = False) -> None:
        """See :meth:`LtProduct.run`."""
        self.product.run(self.algorithm, x, weight, out, add=add)


class Products:
    """Products of one model. Until tuned, and wherever tensors are not on a GPU, torch chooses."""

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self.chosen: dict[Shape, Choice] = {}
        """Where :meth:`tune` found an algorithm that is faster than torch's."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """``x Wᵀ + b``: [rows, inputs] · [outputs, inputs] → [rows, outputs], contiguous.

        ``out`` takes the result of a product without bias.
        """
        choice = self._choice(x, weight) if bias is None else None
        if choice is None:
            return linear(x, weight, bias) if out is None else torch.mm(x, weight.t(), out=out)
        out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
        if not LtProduct.takes(x, weight, out):
            return torch.mm(x, weight.t(), out=out)
        choice.run(x, weight, out)
        return out

    def add_to(self, residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """``residual += x Wᵀ``: [rows, outputs], in place; what is rounded is the sum."""
        choice = self._choice(x, weight)
        if choice is None or not LtProduct.takes(x, weight, residual):
            return torch.addmm(residual, x, weight.t(), out=residual)
        choice.run(x, weight, residual, add=True)
        return residual

    def _choice(self, x: Tensor, weight: Tensor) -> Choice | None:
        return self.chosen.get((x.shape[0], weight.shape[0], weight.shape[1])) if self.chosen else None

    @torch.inference_mode()
    def tune(self, rows: Sequence[int], weights: Iterable[Tensor], *, limit_s: float) -> None:
        """Measure the algorithms for each number of ``rows`` with each shape of ``weights``; the heaviest shape first.

        ``weights`` [outputs, inputs] each: those of all layers, all of one dtype; only bfloat16 on a GPU is tuned.
        No capture may be going on. Ends early after ``limit_s`` seconds; what was not measured until then stays
        torch's choice. Of near-equals either may win, so that the last bits of a result can differ from run to run.
        """
        deadline = time.monotonic() + limit_s
        by_shape: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for weight in weights:
            if weight.is_cuda and LtProduct.takes(weight):
                by_shape[weight.shape[0], weight.shape[1]].append(weight)
        bench = _Bench()
        for shape, alike in sorted(by_shape.items(), key=lambda item: -len(item[1]) * item[1][0].numel()):
            for count in rows:
                if time.monotonic() >= deadline:
                    return
                found = bench.fastest(count, alike[: launches(count, alike[0])])
                if found is not None:
                    self.chosen[count, *shape] = found


class _Bench:
    """Times products of weights that stand in for those of a step."""

    def __init__(self) -> None:
        self._library: CublasLt | None = None

    def fastest(self, rows: int, weights: Sequence[Tensor]) -> Choice | None:
        """The algorithm that takes the least time, agrees with torch, and beats it by enough.

        None if there is none, or no memory to find out.
        """
        outputs, inputs = weights[0].shape
        try:
            x = torch.randn(rows, inputs, dtype=weights[0].dtype, device=weights[0].device)
            out = x.new_empty(rows, outputs)
            # A copy: the weights may be loaded meanwhile.
            known = weights[0].clone()
            expected = linear(x, known)
            if self._library is None:
                self._library = CublasLt(x.device)
            product = self._library.product(rows, outputs, inputs)
            choices = [Choice(product, algorithm) for algorithm in product.algorithms(CANDIDATES)]
        except (CublasLtError, torch.OutOfMemoryError):
            return None
        best, least = None, WORTH * _milliseconds(lambda weight: torch.mm(x, weight.t(), out=out), weights)
        for choice in choices:
            taken = self._measured(choice, x, known, weights, out, expected, HOPELESS * least)
            if taken <= least:
                best, least = choice, taken
        return best

    def _measured(
        self,
        choice: Choice,
        x: Tensor,
        known: Tensor,
        weights: Sequence[Tensor],
        out: Tensor,
        expected: Tensor,
        most: float,
    ) -> float:
        """Milliseconds with ``weights``; infinite if it cannot do this, or what it makes of ``known`` is wrong."""
        try:
            choice.run(x, known, out)
            if not _agree(out, expected):
                return math.inf
        except (CublasLtError, torch.OutOfMemoryError):
            return math.inf
        return _milliseconds(lambda weight: choice.run(x, weight, out), weights, most)


def launches(rows: int, weight: Tensor) -> int:
    """With how many weights like that, one behind the other, a product of so many ``rows`` is measured."""
    outputs, inputs = weight.shape
    moved = weight.nbytes + rows * (outputs + inputs) * weight.itemsize
    seconds = max(moved / BYTES_A_SECOND, 2 * rows * outputs * inputs / OPERATIONS_A_SECOND)
    return max(1 + COLD_BYTES // moved, min(LAUNCHES, math.ceil(SPAN_S / seconds)))


def _milliseconds(launch: Callable[[Tensor], object], weights: Sequence[Tensor], most: float = math.inf) -> float:
    """For a launch with each of ``weights``: the best of a few repeats, or of one that takes longer than ``most``."""
    best = math.inf
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(QUEUE_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        for weight in weights:
            launch(weight)
        end.record()
        end.synchronize()
        best = min(best, float(begin.elapsed_time(end)))
        if best > most:
            break
    return best


def _agree(result: Tensor, expected: Tensor) -> bool:
    """Both are roundings of the same sums, taken in another order."""
    tolerance = 4 * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool(((result - expected).abs() <= tolerance).all())
