"""Products of few rows against torch: every way in and out, every number of rows."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.gemv.product import Norm, Splits, gemv, gemv_reference
from penstock.kernels.gemv.shapes import GemvShape
from support.devices import on_every_kernel

OUTPUTS, INPUTS = 24, 512
SHAPES = [GemvShape(8, 128, 4, 1), GemvShape(4, 256, 4, 2), GemvShape(1, 512, 1, 1), GemvShape(2, 128, 2, 4)]
WAYS: dict[str, dict[str, bool | None]] = {
    "plain": {},
    "bias": {"bias": True},
    "norm": {"norm": True},
    "norm without a weight, bias": {"norm": None, "bias": True},
    "norm, gated": {"norm": True, "gated": True},
    "onto the stream": {"add": True},
    "late": {"late_release": True},
}


def drawn(*shape: int, device: str) -> torch.Tensor:
    # The interpreter multiplies bfloat16 as if it were integers.
    return torch.randn(*shape, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def bound(device: str) -> float:
    return 4e-3 if device == "cuda" else 1e-6


@on_every_kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_equals_torch(device: str, rows: int, shape: GemvShape, way: str) -> None:
    torch.manual_seed(rows)
    asked = WAYS[way]
    gated, add = bool(asked.get("gated")), bool(asked.get("add"))
    x, weight = drawn(rows, INPUTS, device=device), drawn((1 + gated) * OUTPUTS, INPUTS, device=device) * 0.1
    norm = Norm(drawn(INPUTS, device=device) if asked["norm"] else None, 1e-5) if "norm" in asked else None
    bias = drawn(OUTPUTS, device=device) if asked.get("bias") else None
    start = drawn(rows, OUTPUTS, device=device)
    got, want = start.clone(), start.float()
    late = bool(asked.get("late_release"))
    gemv(x, weight, got, shape, norm=norm, bias=bias, gated=gated, add=add, late_release=late)
    gemv_reference(x, weight, want, norm=norm, bias=bias, gated=gated, add=add)
    assert error(got, want) < bound(device)


@on_every_kernel
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("splits", [2, 8])
def test_merges_the_splits_of_attention(device: str, rows: int, splits: int) -> None:
    heads, dim = 4, 32
    partial = torch.randn(rows, heads, splits, dim, device=device)
    lse = torch.randn(rows, heads, splits, device=device) * 4
    lse[0, 1, 1:] = -1e30
    partial[0, 1, 1:] = 0
    weight = drawn(OUTPUTS, heads * dim, device=device)
    got = drawn(rows, OUTPUTS, device=device)
    scale = torch.softmax(lse.double() * torch.log(torch.tensor(2.0, dtype=torch.double)), -1)
    attended = torch.einsum("rhs,rhsd->rhd", scale, partial.double()).flatten(1)
    want = got.double() + attended @ weight.double().t()
    gemv(Splits(partial, lse), weight, got, GemvShape(4, 64, 2, 2), add=True)
    assert error(got, want) < bound(device)


def test_the_reference_merges_alike() -> None:
    partial, lse = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4)
    scale = (2 ** lse.double()) / (2 ** lse.double()).sum(-1, keepdim=True)
    want = torch.einsum("rhs,rhsd->rhd", scale, partial.double()).flatten(1)
    assert error(Splits(partial, lse).merged(), want) < 1e-6
