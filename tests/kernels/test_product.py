"""Products of few rows: every cut of the tables equals torch."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.norm import add_rms_norm, add_rms_norm_reference
from penstock.kernels.product import (
    GATED_NARROW,
    GATED_WIDE,
    SPLIT_NARROW,
    SPLIT_WIDE,
    ProductShape,
    gated_product,
    gated_shape,
    split_product,
    split_shape,
)
from support.devices import on_every_kernel

GATED = [shape for _, shape in GATED_NARROW + GATED_WIDE]
SPLIT = [shape for _, shape in SPLIT_NARROW + SPLIT_WIDE]


def drawn(*shape: int, device: str) -> torch.Tensor:
    # The interpreter multiplies bfloat16 as if it were integers.
    return torch.randn(*shape, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@on_every_kernel
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 70])
@pytest.mark.parametrize("shape", SPLIT)
def test_parts_add_up_to_the_product(device: str, rows: int, shape: ProductShape) -> None:
    outputs, inputs = 2 * shape.outputs, 2 * shape.splits * shape.inputs
    x, weight = drawn(rows, inputs, device=device), drawn(outputs, inputs, device=device)
    parts = split_product(x, weight, shape)
    assert parts.shape == (shape.splits, rows, outputs)
    assert error(parts.sum(0), x.double() @ weight.double().t()) < 1e-4, "sums are float32"
    residual, norm = drawn(rows, outputs, device=device), drawn(outputs, device=device)
    got = add_rms_norm(parts, residual.clone(), norm, 1e-6)
    want = add_rms_norm_reference(parts, residual.clone(), norm, 1e-6)
    assert all(error(ours, theirs) < 5e-3 for ours, theirs in zip(got, want, strict=True))


@on_every_kernel
@pytest.mark.parametrize("rows", [1, 16, 33, 70])
@pytest.mark.parametrize("shape", GATED)
def test_the_gate_is_applied(device: str, rows: int, shape: ProductShape) -> None:
    outputs, inputs = 2 * shape.outputs, 2 * shape.inputs
    x, weight = drawn(rows, inputs, device=device), drawn(2 * outputs, inputs, device=device) * 0.1
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=-1)
    assert error(gated_product(x, weight, shape), torch.nn.functional.silu(gate) * up) < 1e-2


def test_the_library_is_asked_where_no_cut_fits() -> None:
    for x in (torch.zeros(4, 48), torch.zeros(4, 48, dtype=torch.bfloat16), torch.zeros(500, 4096)):
        assert gated_shape(x, torch.zeros(96, x.shape[1])) is None
        assert split_shape(x, torch.zeros(48, x.shape[1])) is None
