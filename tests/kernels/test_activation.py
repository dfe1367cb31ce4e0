"""SwiGLU's gate against the definition, in float64 with the roundings that are promised.

``TRITON_INTERPRET=1`` runs the kernel without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from penstock.kernels.activation import silu_mul
from penstock.kernels.dispatch import INTERPRETED
from penstock.kernels.norm import Late
from support.devices import on_every_device

in_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def expected(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return ((gate / (1 + (-gate).exp())).to(gate_up.dtype).double() * up).to(gate_up.dtype)


def assert_rounded(found: Tensor, expected: Tensor, roundings: int) -> None:
    """Equal in float32; in bfloat16 a tie may be rounded otherwise, seldom. The interpreter rounds towards zero."""
    assert found.dtype == expected.dtype
    cut = INTERPRETED and found.device.type == "cpu"
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    else:
        torch.testing.assert_close(found, expected, rtol=(roundings if cut else 1) * 2**-7, atol=1e-7)
        assert cut or int((found != expected).sum()) <= 1 + found.numel() // 200


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("rows", "inner"), [(1, 3072), (2, 14336), (15, 257), (16, 1025), (40, 7), (1, 1)])
def test_gate_times_up(device: str, dtype: torch.dtype, rows: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(inner)
    gate_up = (4 * torch.randn(rows, 2 * inner, generator=generator)).to(dtype).to(device)
    unchanged = gate_up.clone()
    found = silu_mul(gate_up)
    assert found.shape == (rows, inner)
    assert_rounded(found, expected(gate_up), roundings=2)
    assert torch.equal(gate_up, unchanged)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's
@on_every_device
@in_every_dtype
def test_extreme_gates(device: str, dtype: torch.dtype) -> None:
    """Closed gates let nothing through, open ones everything; NaN stays where it is."""
    gate = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30, float("inf"), float("nan")])
    gate_up = torch.cat((gate, torch.full_like(gate, 2.0))).to(dtype).to(device)[None]
    found = silu_mul(gate_up)[0]
    assert found[:3].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(found[3:6], 2 * gate_up[0, 3:6])
    assert bool(found[6].isnan())


@on_every_device
def test_no_rows(device: str) -> None:
    assert silu_mul(torch.empty(0, 64, device=device)).shape == (0, 32)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("rows", "inner", "size"), [(1, 3072, 1024), (16, 1025, 576), (70, 96, 4096)])
def test_what_a_norm_left_to_it_comes_first(device: str, dtype: torch.dtype, rows: int, inner: int, size: int) -> None:
    generator = torch.Generator().manual_seed(inner)
    gate_up = (9 * torch.randn(rows, 2 * inner, generator=generator)).to(dtype).to(device)
    stream = (3 * torch.randn(rows, size, generator=generator)).to(dtype).to(device)
    found = silu_mul(gate_up, Late(stream, 1e-6))
    scale = 1 / (stream.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want = expected((gate_up.double() * scale).to(dtype))
    error = (found.double() - want.double()).norm() / want.double().norm()
    narrow = 2e-2 if INTERPRETED and device == "cpu" else 6e-3  # the interpreter rounds towards zero
    assert error < (2e-6 if dtype == torch.float32 else narrow)
