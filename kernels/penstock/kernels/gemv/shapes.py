"""How the kernels of a step of few rows are cut: plain data, chosen by measurement (:mod:`.tuned`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from penstock.kernels.dispatch import SMALL_MODEL

MOST_ROWS: Final = 3
"""Of a step that is computed so; see :func:`most_rows`."""
_MOST_ROWS_OF_LARGE: Final = 2
MOST_PACKED: Final = 16
"""Query heads that share a key/value head: rows of a tensor core's tile."""
MOST_MERGED_BY_PRODUCT: Final = 8
"""Splits up to which the product behind attention may merge them: each of its programs reads all of them."""
VECTOR_BYTES: Final = 16
"""Of one load of a thread."""


@dataclass(frozen=True, slots=True)
class GemvShape:
    """One cut of a product of few rows."""

    outputs: int
    """Of a program; a power of two."""
    inputs: int
    """Of one step of a program; a power of two."""
    warps: int
    ahead: int
    """Steps whose weights are loaded before the kernel in front is done; at least 1."""

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether it divides a weight of that shape."""
        return not outputs % self.outputs and not inputs % self.inputs


@dataclass(frozen=True, slots=True)
class SplitShape:
    """One cut of attention."""

    splits: int
    """Programs that share the context of a row and key/value head; a power of two."""
    tile: int
    """Tokens of one step of a program; a power of two, at least 16."""
    stages: int
    warps: int
    merged: bool
    """The last of the splits that is done merges all; else the product behind attention does."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """All cuts of a step."""

    qkv: GemvShape
    attention: SplitShape
    output: GemvShape
    gate_up: GemvShape
    down: GemvShape
    head: GemvShape


PRODUCTS: Final = ("qkv", "output", "gate_up", "down", "head")
"""The fields of :class:`StepShape` that are products, in the order of a step."""


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """What of a model decides how its steps are best cut."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def weight(self, product: str) -> tuple[int, int]:
        """Outputs and inputs of one of PRODUCTS; of gate and up the outputs of either."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "output": (self.hidden, self.heads * self.head_dim),
            "gate_up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            "head": (self.vocabulary, self.hidden),
        }[product]

    def fits(self, shape: StepShape) -> bool:
        """Whether a shape can be used for it. The vocabulary may be ragged."""
        return all(
            getattr(shape, name).fits(outputs if name != "head" else getattr(shape, name).outputs, inputs)
            for name in PRODUCTS
            for outputs, inputs in (self.weight(name),)
        )


CONTEXTS: Final = (1024, 8192, 1 << 30)
"""Steps are cut by their longest context: up to so many tokens alike."""
_SPLITS: Final = (8, 32, 64)
"""Of attention for each of them."""
_STARTS: Final = (
    {
        "qkv": GemvShape(4, 1024, 4, 1),
        "output": GemvShape(8, 1024, 4, 2),
        "gate_up": GemvShape(4, 1024, 4, 2),
        "down": GemvShape(4, 1024, 4, 4),
        "head": GemvShape(16, 512, 4, 1),
    },
    {
        "qkv": GemvShape(16, 512, 4, 2),
        "output": GemvShape(8, 2048, 8, 1),
        "gate_up": GemvShape(4, 1024, 4, 1),
        "down": GemvShape(4, 1024, 4, 3),
        "head": GemvShape(16, 512, 4, 1),
    },
    {
        "qkv": GemvShape(2, 1024, 4, 1),
        "output": GemvShape(2, 2048, 4, 1),
        "gate_up": GemvShape(2, 1024, 4, 1),
        "down": GemvShape(2, 1024, 4, 3),
        "head": GemvShape(8, 512, 4, 1),
    },
)
"""Where to look for a cut: the first is the default."""


def context_class(longest: int) -> int:
    """The index in CONTEXTS of a step whose longest context is ``longest`` tokens."""
    return next(index for index, most in enumerate(CONTEXTS) if longest <= most)


def most_rows(sizes: LayerSizes) -> int:
    """Of a step that is computed so. The kernels are right for any few; with more the tensor cores' products win.

    On an H200 (bench/results/h200/few_rows.txt).
    """
    return MOST_ROWS if sizes.hidden <= SMALL_MODEL else _MOST_ROWS_OF_LARGE


def default_shape(sizes: LayerSizes, rows: int, context: int) -> StepShape | None:
    """A cut for a model that nobody has measured; None: these kernels do not take it.

    ``context`` is an index of CONTEXTS. Right whatever the machine, and near the best on an H200.
    """
    if not 1 <= rows <= most_rows(sizes) or not _takes(sizes):
        return None
    return next(iter(starts(sizes, rows, context)))


def starts(sizes: LayerSizes, rows: int, context: int) -> list[StepShape]:
    """Cuts to begin a search from, the default first."""
    found = []
    for start in _STARTS:
        products = {name: _fitting(start[name], *sizes.weight(name), rows, name == "head") for name in PRODUCTS}
        for merged in (True, False) if _SPLITS[context] <= MOST_MERGED_BY_PRODUCT else (True,):
            attention = SplitShape(_SPLITS[context], 32 if not merged else 64, 2, 4, merged)
            found.append(StepShape(attention=attention, **products))
    return found


def _takes(sizes: LayerSizes) -> bool:
    packed = sizes.heads % sizes.kv_heads == 0 and sizes.heads // sizes.kv_heads <= MOST_PACKED
    head = sizes.head_dim in (16, 32, 64, 128, 256)
    return packed and head and all(size % 32 == 0 for size in (sizes.hidden, sizes.inner))


def _fitting(start: GemvShape, outputs: int, inputs: int, rows: int, ragged: bool) -> GemvShape:
    """The cut nearest to ``start`` that divides such a weight; more rows take more registers.

    Where that makes a step small, fewer warps share it: each thread still has a whole load.
    """
    most = start.outputs if rows == 1 else min(start.outputs, 8)
    fitting = most if ragged else min(most, outputs & -outputs)
    step = min(start.inputs, inputs & -inputs)
    warps = min(start.warps, max(1, fitting * step // (32 * vector(torch.bfloat16))))
    return GemvShape(fitting, step, warps, min(start.ahead, inputs // step))


def vector(dtype: torch.dtype) -> int:
    """Elements of one load of a thread."""
    return VECTOR_BYTES // dtype.itemsize
