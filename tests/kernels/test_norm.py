"""Residual addition and RMS norm against the definition, in float64 with the roundings that are promised.

``TRITON_INTERPRET=1`` runs the kernel without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import INTERPRETED
from penstock.kernels.norm import add_rms_norm
from support.devices import on_every_device

EPS = 1e-6
NAN = float("nan")

in_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SHAPES = [(1, 1024), (3, 4096), (2, 8192), (5, 7), (37, 1000), (2, 5120)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normalised(total: Tensor, weight: Tensor) -> Tensor:
    wide = total.double()
    scaled = (wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()).to(total.dtype)
    return (scaled.double() * weight.double()).to(total.dtype)


def assert_rounded(found: Tensor, expected: Tensor, roundings: int) -> None:
    """Equal in float32; in bfloat16 a tie may be rounded otherwise, seldom. The interpreter rounds towards zero."""
    assert found.dtype == expected.dtype
    cut = INTERPRETED and found.device.type == "cpu"
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(found, expected, rtol=(roundings if cut else 1) * 2**-7, atol=1e-6)
        assert cut or int((found != expected).sum()) <= 1 + found.numel() // 200


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).to(device)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_the_sum_is_stored_and_normalised(device: str, dtype: torch.dtype, rows: int, size: int) -> None:
    x = 3 * random(rows, size, dtype=dtype, device=device)
    weight = random(size, dtype=dtype, device=device)
    around = torch.full((rows + 4, size), NAN, dtype=dtype, device=device)
    residual = around[2 : rows + 2]
    residual.copy_(random(rows, size + 1, dtype=dtype, device=device)[:, 1:])
    total = (x.float() + residual.float()).to(dtype)
    unchanged = x.clone()

    found, stream = add_rms_norm(x, residual, weight, EPS)
    assert stream.data_ptr() == residual.data_ptr()
    assert_rounded(stream, total, roundings=1)
    assert torch.equal(x, unchanged)
    assert bool(torch.cat((around[:2], around[rows + 2 :])).isnan().all())
    assert_rounded(found, normalised(stream, weight), roundings=2)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_the_stream_begins_with_x(device: str, dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = random(rows, size, dtype=dtype, device=device), random(size, dtype=dtype, device=device)
    unchanged = x.clone()
    found, stream = add_rms_norm(x, None, weight, EPS)
    assert stream is x
    assert torch.equal(x, unchanged)
    assert_rounded(found, normalised(x, weight), roundings=2)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("starts", [False, True], ids=["added", "begins the stream"])
def test_partial_sums(device: str, dtype: torch.dtype, parts: int, starts: bool) -> None:
    """Of eighths, which every dtype here adds exactly."""
    rows, size = 6, 520
    generator = torch.Generator().manual_seed(parts)
    eighths = torch.randint(-8, 9, (parts + 1, rows, size), generator=generator).to(device) / 8
    x, weight = eighths[1:], random(size, dtype=dtype, device=device)
    residual = None if starts else eighths[0].to(dtype)
    total = eighths[int(starts) :].sum(0).to(dtype)

    found, stream = add_rms_norm(x, residual, weight, EPS)
    assert residual is None or stream is residual
    assert stream.dtype == dtype
    assert torch.equal(stream, total)
    assert_rounded(found, normalised(total, weight), roundings=2)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@on_every_device
@in_every_dtype
def test_extreme_rows_keep_to_themselves(device: str, dtype: torch.dtype) -> None:
    """Zeros are normalised to zeros, tiny values by ``eps``; NaN and infinity reach no other row."""
    x = random(5, 96, dtype=dtype, device=device)
    x[0], x[1, 5], x[2, 5], x[3] = 0, NAN, float("inf"), 1e-20
    found, _ = add_rms_norm(x, None, torch.ones(96, dtype=dtype, device=device), EPS)
    assert bool((found[0] == 0).all())
    assert bool(found[1].isnan().all())
    assert bool(found[2, 5].isnan())
    torch.testing.assert_close(found[3].double(), torch.full_like(found[3], 1e-17).double(), rtol=1e-2, atol=0)
    assert_rounded(found[4:], normalised(x[4:], torch.ones(96, device=device)), roundings=2)


@on_every_device
def test_no_rows(device: str) -> None:
    x = torch.empty(0, 64, device=device)
    found, stream = add_rms_norm(x, None, torch.ones(64, device=device), EPS)
    assert found.shape == stream.shape == (0, 64)
