# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"
# ruff: noqa: RUF005, SIM108  Triton adds tuples, knows no unpacking, and wants what is constant in an if
"""The kernel of :mod:`penstock.kernels.gemv.product`.

A program takes some outputs and goes over all inputs. Each thread multiplies the elements that one of its loads brings
and adds them up at once, so that it holds one sum for eight weights; the sums of threads meet at the end. A weight is
loaded once for all rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.gemv.product import Norm, Splits
from penstock.kernels.gemv.shapes import GemvShape, vector
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.overlap_kernel import release_next, wait_for_previous


@triton.jit
def merged_splits(partial, lse, row, column, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Elements ``column`` [n] of what attention made of a row: see :class:`penstock.kernels.gemv.product.Splits`."""
    entry = (row * HEADS + column // HEAD_DIM) * SPLITS
    highest = tl.load(lse + entry)
    for split in tl.static_range(1, SPLITS):
        highest = tl.maximum(highest, tl.load(lse + entry + split))
    mass = tl.zeros_like(highest)
    value = tl.zeros_like(highest)
    for split in tl.static_range(SPLITS):
        share = tl.exp2(tl.load(lse + entry + split) - highest)
        mass += share
        value += share * tl.load(partial + (entry + split) * HEAD_DIM + column % HEAD_DIM)
    return value / mass


@triton.jit
def products_of(weights, x, sums, OUTPUT_TILE: tl.constexpr, INPUT_TILE: tl.constexpr, VECTOR: tl.constexpr):
    """``sums`` [OUTPUT_TILE, INPUT_TILE / VECTOR] and the products of a tile with ``x`` [INPUT_TILE]."""
    products = tl.reshape(weights * x[None, :], [OUTPUT_TILE, INPUT_TILE // VECTOR, VECTOR])
    return sums + tl.sum(products, 2)


@triton.jit
def squares_of(x, INPUT_TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Sums of squares of ``x`` [INPUT_TILE], [INPUT_TILE / VECTOR]."""
    return tl.sum(tl.reshape(x * x, [INPUT_TILE // VECTOR, VECTOR]), 1)


@triton.jit
def gemv_kernel(
    x, lse, weight, norm_weight, bias, out, eps,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    OUTPUT_TILE: tl.constexpr, INPUT_TILE: tl.constexpr, VECTOR: tl.constexpr, AHEAD: tl.constexpr,
    NORM: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, LATE_RELEASE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """SPLITS: of ``x``, which is float32 then; 0: ``x`` [ROWS, INPUTS] is of the dtype of the weight."""
    output = tl.program_id(0) * OUTPUT_TILE + tl.arange(0, OUTPUT_TILE)
    place = tl.arange(0, INPUT_TILE)
    source = weight + output.to(tl.int64)[:, None] * INPUTS + place[None, :]
    TILES: tl.constexpr = INPUTS // INPUT_TILE
    SUMS: tl.constexpr = INPUT_TILE // VECTOR
    if not LATE_RELEASE:
        release_next(OVERLAP)
    ahead = ()
    ahead_up = ()
    for tile in tl.static_range(AHEAD):
        ahead = ahead + (tl.load(source + tile * INPUT_TILE),)
        if GATED:
            ahead_up = ahead_up + (tl.load(source + OUTPUTS * INPUTS + tile * INPUT_TILE),)
    if BIAS:
        offset = tl.load(bias + output).to(tl.float32)
    wait_for_previous(OVERLAP)
    if LATE_RELEASE:
        release_next(OVERLAP)

    sums = ()
    sums_up = ()
    squares = ()
    before = ()
    for row in tl.static_range(ROWS):
        sums = sums + (tl.zeros([OUTPUT_TILE, SUMS], tl.float32),)
        sums_up = sums_up + (tl.zeros([OUTPUT_TILE, SUMS], tl.float32),)
        squares = squares + (tl.zeros([INPUT_TILE // VECTOR], tl.float32),)
        if ADD:
            before = before + (tl.load(out + row * OUTPUTS + output).to(tl.float32),)
    for tile in tl.static_range(TILES):
        if tile < AHEAD:
            weights = ahead[tile].to(tl.float32)
        else:
            weights = tl.load(source + tile * INPUT_TILE).to(tl.float32)
        if GATED:
            if tile < AHEAD:
                weights_up = ahead_up[tile].to(tl.float32)
            else:
                weights_up = tl.load(source + OUTPUTS * INPUTS + tile * INPUT_TILE).to(tl.float32)
        if SCALED:
            factor = tl.load(norm_weight + tile * INPUT_TILE + place).to(tl.float32)
        new_sums = ()
        new_sums_up = ()
        new_squares = ()
        for row in tl.static_range(ROWS):
            column = tile * INPUT_TILE + place
            if SPLITS > 0:
                value = merged_splits(x, lse, row, column, INPUTS // HEAD_DIM, HEAD_DIM, SPLITS)
            else:
                value = tl.load(x + row * INPUTS + column).to(tl.float32)
            if NORM:
                new_squares = new_squares + (squares[row] + squares_of(value, INPUT_TILE, VECTOR),)
            else:
                new_squares = new_squares + (squares[row],)
            if SCALED:
                value = value * factor
            new_sums = new_sums + (products_of(weights, value, sums[row], OUTPUT_TILE, INPUT_TILE, VECTOR),)
            if GATED:
                new_sums_up = new_sums_up + (
                    products_of(weights_up, value, sums_up[row], OUTPUT_TILE, INPUT_TILE, VECTOR),
                )
            else:
                new_sums_up = new_sums_up + (sums_up[row],)
        sums = new_sums
        sums_up = new_sums_up
        squares = new_squares
    for row in tl.static_range(ROWS):
        result = tl.sum(sums[row], 1)
        if NORM:
            scale = tl.rsqrt(tl.sum(squares[row], 0) / INPUTS + eps)
            result = result * scale
        if BIAS:
            result = result + offset
        if GATED:
            up = tl.sum(sums_up[row], 1)
            if NORM:
                up = up * scale
            result = result / (1 + tl.exp(-result)) * up
        if ADD:
            result += before[row]
        tl.store(out + row * OUTPUTS + output, result.to(out.dtype.element_ty))


def gemv_triton(
    x: Tensor | Splits,
    weight: Tensor,
    out: Tensor,
    shape: GemvShape,
    norm: Norm | None,
    bias: Tensor | None,
    gated: bool,
    add: bool,
    late_release: bool,
) -> None:
    """See :func:`penstock.kernels.gemv.product.gemv`."""
    rows, outputs = out.shape
    inputs = weight.shape[1]
    values, lse = x if isinstance(x, Splits) else (x, None)
    launch(gemv_kernel, (outputs // shape.outputs,))(
        values, lse, weight, norm.weight if norm else None, bias, out, norm.eps if norm else 0.0,
        rows, outputs, inputs, shape.outputs, shape.inputs, vector(weight.dtype), shape.ahead,
        norm is not None, norm is not None and norm.weight is not None, bias is not None, gated, add,
        0 if lse is None else lse.shape[-1], 1 if lse is None else values.shape[-1], late_release, overlaps(rows),
        num_warps=shape.warps, **launch_options(rows),
    )  # fmt: skip
