"""Layers by themselves: room for adapters, rotary tables, the choice of a product's library."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn.functional import linear

from penstock.executor.layers.cublaslt import CublasLt, CublasLtError
from penstock.executor.layers.linear import Linear
from penstock.executor.layers.matmul import COLD_BYTES, LAUNCHES, Choice, Products, launches
from penstock.executor.layers.norm import RMSNorm
from penstock.executor.layers.placement import Placement
from penstock.executor.layers.rotary import RotaryEmbedding
from penstock.executor.models.config import RopeConfig

HOST = Placement(torch.float32, torch.device("cpu"))


def test_rows_of_adapters_stand_behind_those_of_the_parts() -> None:
    plain = Linear(8, {"a": 3, "b": 5}, HOST, bias=True)
    roomy = Linear(8, {"a": 3, "b": 5}, HOST, bias=True, adapter_rows=4)
    for name, tensor in plain.destinations("map").items():
        tensor.normal_()
        roomy.destinations("map")[name].copy_(tensor)
    assert roomy.weight.shape == (12, 8)
    assert torch.equal(roomy.weight[:8], plain.weight)
    assert not roomy.weight[8:].any()
    roomy.weight[8:].fill_(7)
    x = torch.randn(6, 8)
    torch.testing.assert_close(roomy(x), plain(x), atol=1e-6, rtol=0)
    assert roomy(x).shape == (6, 8)


def test_a_product_leaves_its_bias_out() -> None:
    both = Linear(8, {"a": 3, "b": 5}, HOST, bias=True)
    assert both.bias is not None
    for tensor in both.destinations("map").values():
        tensor.normal_()
    x = torch.randn(6, 8)
    torch.testing.assert_close(both.product(x) + both.bias, both(x), atol=1e-6, rtol=0)
    assert (both.product(x) - both(x)).abs().max() > 0.1


def test_a_norm_adds_to_the_stream_in_place() -> None:
    norm = RMSNorm(16, 1e-6, HOST)
    norm.weight.normal_()
    first, second = torch.randn(3, 16), torch.randn(3, 16)
    total = first + second
    _, stream = norm(first, None)
    assert stream is first
    normalised, stream = norm(second, stream)
    assert stream is first
    assert torch.equal(stream, total)
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(normalised, expected)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_the_table_holds_the_rotation_of_every_position(kind: str) -> None:
    rope = RopeConfig(500_000.0, kind, 4.0, 1.0, 4.0, 64)  # type: ignore[arg-type]
    rotary = RotaryEmbedding(24, rope, 200, torch.device("cpu"))
    positions = torch.tensor([0, 1, 63, 199])
    rotation = rotary.at(positions, torch.float32)
    assert rotary.table.shape == (200, 24)
    torch.testing.assert_close(rotary.table[positions], torch.cat((rotation.cos, rotation.sin), dim=-1)[:, 0])
    assert rotary.table is rotary.table


def test_nothing_is_chosen_where_nothing_can_be_measured() -> None:
    products = Products()
    products.tune([1, 2], [torch.randn(4, 8)], limit_s=1)
    assert not products.chosen


def test_products_are_measured_cold_and_long_enough() -> None:
    small = torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta")
    assert launches(8, small) * (small.nbytes + 8 * 2 * (1024 + 1024)) > COLD_BYTES
    large = torch.empty(28_672, 4096, dtype=torch.bfloat16, device="meta")
    assert launches(64, large) == 7, "each takes 60 µs to read"
    assert launches(16_384, large) == 1, "each takes 5 ms to multiply"
    assert all(launches(rows, small) >= LAUNCHES for rows in (1, 64, 512))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_where_there_is_no_gpu_the_library_says_so() -> None:
    """Whether or not torch has brought it along."""
    with pytest.raises(CublasLtError, match="cuBLASLt"):
        CublasLt(torch.device("cpu"))


def test_adding_to_a_residual() -> None:
    x, weight, residual = torch.randn(3, 8), torch.randn(4, 8), torch.randn(3, 4)
    expected = residual + linear(x, weight)
    assert Products().add_to(residual, x, weight) is residual
    torch.testing.assert_close(residual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_agree_whatever_was_chosen(dtype: torch.dtype) -> None:
    products = Products()
    weights = [torch.randn(768, 512, device="cuda", dtype=dtype) / 20 for _ in range(4)]
    rows = [1, 16, 48, 130]
    products.tune(rows, weights, limit_s=30)
    assert set(products.chosen) <= {(count, 768, 512) for count in rows}
    if dtype == torch.bfloat16:
        found = CublasLt(weights[0].device).product(130, 768, 512)
        products.chosen[130, 768, 512] = Choice(found, found.algorithms(4)[-1])
    for count in rows:
        x = torch.randn(count, 512, device="cuda", dtype=dtype)
        expected = linear(x.double(), weights[0].double())
        out = torch.empty(count, 768, device="cuda", dtype=dtype)
        once = torch.ones(count, 768, device="cuda", dtype=dtype)
        torch.testing.assert_close(products.add_to(once, x, weights[0]) - 1, expected.to(dtype), atol=3e-2, rtol=3e-2)
        for result in (products(x, weights[0]), products(x, weights[0], out=out)):
            assert result.is_contiguous()
            error = (result.double() - expected).abs().max() / expected.abs().max()
            assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
def test_tuning_ends_in_time() -> None:
    products = Products()
    weights = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    started = time.monotonic()
    products.tune(range(1, 100_000), weights, limit_s=1)
    assert time.monotonic() - started < 10
