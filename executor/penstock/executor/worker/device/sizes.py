"""How many rows steps compute: few different numbers, so that the start can have met them.

For almost each number of rows the matrix library has a kernel of its own, and loads it when it is launched for the
first time: on an H200 some 3.5 ms for the products of one layer, up to 18 ms. A batch is padded to the next size with
rows of the slot that is nobody's.
"""

from __future__ import annotations

import functools
from typing import Final

GRAIN: Final = 8
"""Rows of a step that computes known ids are a multiple of it. A coarser one costs more than its padding: with
some numbers of rows the library is slow, on an H200 by 15% with 416 against 403."""
MOST_MET: Final = 2048
"""Of steps with more rows the start meets only some: they take so long that it matters less."""
COARSE: Final = 512


def graph_sizes(max_rows: int) -> list[int]:
    """Sizes of decode batches, and of samples, up to ``max_rows``.

    Fine enough that padding costs at most an eighth above 8 rows and far less above 64.
    """
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, max_rows + 1, 32)]
    fitting = [size for size in sizes if size < max_rows]
    return [*fitting, max_rows]


def graph_size(rows: int, max_rows: int) -> int:
    """The smallest of them that holds ``rows``."""
    return _sizes_of_graphs(max_rows)[rows]


@functools.cache
def _sizes_of_graphs(max_rows: int) -> list[int]:
    """By number of rows, from 0 on."""
    sizes = graph_sizes(max_rows)
    return [next(size for size in sizes if size >= rows) for rows in range(max_rows + 1)]


def step_size(rows: int, max_rows: int) -> int:
    """The size of a step of ``rows`` that computes known ids. Raises ValueError if there is no room for them."""
    if rows > max_rows:
        raise ValueError(f"a step of {rows} rows, there is room for {max_rows}")
    return min(max_rows, -(-rows // GRAIN) * GRAIN)


def met_step_sizes(max_rows: int) -> list[int]:
    """Those that the start meets: all up to MOST_MET, and enough larger ones to meet most kernels."""
    fine = range(GRAIN, min(MOST_MET, max_rows) + 1, GRAIN)
    return [*fine, *range(MOST_MET + COARSE, max_rows + 1, COARSE), *([max_rows] if max_rows % GRAIN else [])]
