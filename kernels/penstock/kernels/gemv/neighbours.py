"""Cuts near a cut: where a search for a better one looks next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from penstock.kernels.gemv.shapes import MOST_MERGED_BY_PRODUCT, GemvShape, LayerSizes, StepShape


def alternatives(shape: StepShape, sizes: LayerSizes, product: str) -> Iterator[StepShape]:
    """``shape`` with one thing about one product changed by a factor of two, as far as it fits."""
    now: GemvShape = getattr(shape, product)
    outputs, inputs = sizes.weight(product)
    tried = [
        *(replace(now, outputs=count) for count in (now.outputs // 2, now.outputs * 2)),
        *(replace(now, inputs=count) for count in (now.inputs // 2, now.inputs * 2)),
        *(replace(now, warps=count) for count in (now.warps // 2, now.warps * 2)),
        *(replace(now, ahead=count) for count in (now.ahead - 1, now.ahead + 1, now.ahead + 2)),
        replace(now, outputs=now.outputs // 2, inputs=now.inputs * 2),
        replace(now, outputs=now.outputs * 2, inputs=now.inputs // 2),
    ]
    for one in tried:
        within = 1 <= one.outputs <= 32 and 128 <= one.inputs <= 4096 and 1 <= one.warps <= 16
        fits = within and one.fits(one.outputs if product == "head" else outputs, inputs)
        if fits and 1 <= one.ahead <= inputs // one.inputs:
            yield replace(shape, **{product: one})  # type: ignore[arg-type]


def attention_alternatives(shape: StepShape) -> Iterator[StepShape]:
    """``shape`` with one thing about attention changed."""
    now = shape.attention
    tried = [
        *(replace(now, splits=count) for count in (now.splits // 2, now.splits * 2)),
        *(replace(now, tile=count) for count in (now.tile // 2, now.tile * 2)),
        *(replace(now, warps=count) for count in (now.warps // 2, now.warps * 2)),
        *(replace(now, stages=count) for count in (now.stages - 1, now.stages + 1)),
        replace(now, merged=not now.merged),
        replace(now, splits=now.splits // 2, tile=now.tile * 2),
        replace(now, splits=now.splits * 2, tile=now.tile // 2),
    ]
    for one in tried:
        within = 1 <= one.splits <= 128 and 16 <= one.tile <= 128 and 1 <= one.warps <= 8 and 1 <= one.stages <= 4
        if within and (one.merged or one.splits <= MOST_MERGED_BY_PRODUCT):
            yield replace(shape, attention=one)
