"""Bias, QK-norm, rotation and the KV write against the definition, head by head in float64.

``TRITON_INTERPRET=1`` runs the kernel without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import INTERPRETED
from penstock.kernels.norm import Late
from penstock.kernels.rope import rotate_and_store
from support.devices import on_every_device

EPS = 1e-6
NAN = float("nan")
BLOCKS, BLOCK_TOKENS, MAX_POSITIONS = 9, 16, 200


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """Rows at random positions that go to different places of a cache of NaN."""

    heads: int
    kv_heads: int
    qkv: Tensor
    positions: Tensor
    cos_sin: Tensor
    weights: tuple[Tensor, Tensor] | None
    keys: Tensor
    values: Tensor
    places: Tensor

    @classmethod
    def of(
        cls, rows: int, heads: int, kv_heads: int, head_dim: int, norm: bool, dtype: torch.dtype, device: str
    ) -> Case:
        generator = torch.Generator().manual_seed(rows * heads + head_dim)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        rates = 10_000 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(MAX_POSITIONS)[:, None] * rates
        cache = torch.full((BLOCKS, BLOCK_TOKENS, kv_heads, head_dim), NAN, dtype=dtype, device=device)
        return cls(
            heads,
            kv_heads,
            qkv=3 * random(rows, (heads + 2 * kv_heads) * head_dim),
            positions=torch.randint(MAX_POSITIONS, (rows,), generator=generator, dtype=torch.int32).to(device),
            cos_sin=torch.cat((angles.cos(), angles.sin()), dim=1).float().to(device),
            weights=(random(head_dim), random(head_dim)) if norm else None,
            keys=cache,
            values=cache.clone(),
            places=torch.randperm(BLOCKS * BLOCK_TOKENS, generator=generator)[:rows].to(device),
        )

    def run(self, late: Late | None = None, bias: Tensor | None = None) -> Tensor:
        q_weight, k_weight = self.weights or (None, None)
        return rotate_and_store(
            self.qkv, self.positions, self.cos_sin, q_weight, k_weight, EPS,
            self.keys, self.values, self.places, self.heads, self.kv_heads, late, bias,
        )  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the rows."""
        split = self.qkv.view(self.qkv.shape[0], self.heads + 2 * self.kv_heads, -1)
        both = self.heads + self.kv_heads
        query, key, value = split[:, : self.heads], split[:, self.heads : both], split[:, both:]
        if self.weights is not None:
            query, key = (normalised(x, weight) for x, weight in zip((query, key), self.weights, strict=True))
        return self._turned(query), self._turned(key), value

    def _turned(self, x: Tensor) -> Tensor:
        """Each pair is a complex number, and is multiplied by one of length 1."""
        first, second = x.double().chunk(2, dim=-1)
        cos, sin = self.cos_sin[self.positions.long()].double()[:, None].chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.complex(cos, sin)
        return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    scaled = (wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()).to(x.dtype)
    return (scaled.double() * weight.double()).to(x.dtype)


def assert_rounded(found: Tensor, expected: Tensor, roundings: int) -> None:
    """Equal in float32; in bfloat16 a tie may be rounded otherwise, seldom. The interpreter rounds towards zero."""
    assert found.dtype == expected.dtype
    cut = INTERPRETED and found.device.type == "cpu"
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=4e-6)
    else:
        torch.testing.assert_close(found, expected, rtol=(roundings if cut else 1) * 2**-7, atol=roundings * 2**-6)
        assert cut or int((found != expected).sum()) <= 2 + found.numel() // 100


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [
        (16, 8, 128),
        pytest.param(32, 8, 128, marks=pytest.mark.long),
        (4, 1, 64),
        (3, 3, 80),
        (5, 1, 12),
        (2, 2, 256),
    ],
)
@pytest.mark.parametrize("rows", [1, 18])
def test_queries_come_back_and_keys_and_values_are_stored(
    device: str, dtype: torch.dtype, norm: bool, heads: int, kv_heads: int, head_dim: int, rows: int
) -> None:
    case = Case.of(rows, heads, kv_heads, head_dim, norm, dtype, device)
    unchanged = case.qkv.clone()
    query, key, value = case.expected()
    assert_rounded(case.run(), query, roundings=3)
    keys, values = (cache.view(-1, kv_heads, head_dim) for cache in (case.keys, case.values))
    assert_rounded(keys[case.places], key, roundings=3)
    assert torch.equal(values[case.places], value)
    elsewhere = torch.ones(len(keys), dtype=torch.bool, device=device).index_fill_(0, case.places, False)
    assert bool(torch.stack((keys, values), dim=1)[elsewhere].isnan().all())
    assert torch.equal(case.qkv, unchanged)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1024), (18, 4096), (40, 576)])
def test_what_a_norm_left_to_it_comes_first(device: str, dtype: torch.dtype, norm: bool, rows: int, size: int) -> None:
    case = Case.of(rows, 4, 2, 64, norm, dtype, device)
    stream = (5 * torch.randn(rows, size, generator=torch.Generator().manual_seed(rows))).to(dtype).to(device)
    query = case.run(Late(stream, EPS))
    scale = 1 / (stream.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    case.qkv = (case.qkv.double() * scale).to(dtype)
    keys, values = (cache.view(-1, 2, 64)[case.places] for cache in (case.keys, case.values))
    for found, expected in zip((query, keys, values), case.expected(), strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        narrow = 2e-2 if INTERPRETED and device == "cpu" else 8e-3  # the interpreter rounds towards zero
        assert error < (4e-6 if dtype == torch.float32 else narrow)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (5, 1, 12), (3, 3, 80)])
@pytest.mark.parametrize("rows", [1, 18])
def test_a_bias_is_added_behind_the_factor_of_the_row(
    device: str, dtype: torch.dtype, norm: bool, late: bool, heads: int, kv_heads: int, head_dim: int, rows: int
) -> None:
    """Of every head its own, of values too; it is not scaled."""
    case = Case.of(rows, heads, kv_heads, head_dim, norm, dtype, device)
    generator = torch.Generator().manual_seed(rows)
    bias = (4 * torch.randn(case.qkv.shape[1], generator=generator)).to(dtype).to(device)
    stream = (5 * torch.randn(rows, 576, generator=generator)).to(dtype).to(device)
    query = case.run(Late(stream, EPS) if late else None, bias)
    scale = 1 / (stream.double().square().mean(-1, keepdim=True) + EPS).sqrt() if late else 1
    case.qkv = (case.qkv.double() * scale + bias.double()).to(dtype)
    keys, values = (cache.view(-1, kv_heads, head_dim)[case.places] for cache in (case.keys, case.values))
    for found, expected in zip((query, keys, values), case.expected(), strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        narrow = 2e-2 if INTERPRETED and device == "cpu" else 8e-3  # the interpreter rounds towards zero
        assert error < (4e-6 if dtype == torch.float32 else narrow)


@on_every_device
@pytest.mark.parametrize("rows", [6, 20])
def test_padding_rows_share_a_place(device: str, rows: int) -> None:
    """Whatever stays there, nothing else is disturbed."""
    case = Case.of(rows, 4, 2, 32, True, torch.float32, device)
    case.places[2:] = BLOCKS * BLOCK_TOKENS - 1
    case.places[:2] = torch.tensor([BLOCK_TOKENS, 3])
    query, key, value = case.expected()
    assert_rounded(case.run(), query, roundings=3)
    keys, values = case.keys.view(-1, 2, 32), case.values.view(-1, 2, 32)
    assert_rounded(keys[case.places[:2]], key[:2], roundings=3)
    assert torch.equal(values[case.places[:2]], value[:2])
    assert int(keys.isfinite().all(-1).all(-1).sum()) == 3


@on_every_device
def test_a_head_that_is_not_finite_spoils_no_other(device: str) -> None:
    case = Case.of(17, 4, 2, 64, True, torch.bfloat16, device)
    case.qkv[3, 64] = NAN
    query, key, _ = case.expected()
    found = case.run()
    assert bool(found[3, 1].isnan().all())
    found[3, 1], query[3, 1] = 0, 0
    assert_rounded(found, query, roundings=3)
    assert_rounded(case.keys.view(-1, 2, 64)[case.places], key, roundings=3)


@on_every_device
def test_no_rows(device: str) -> None:
    case = Case.of(0, 4, 2, 64, True, torch.float32, device)
    assert case.run().shape == (0, 4, 64)
    assert bool(case.keys.isnan().all())


@pytest.mark.gpu
def test_places_beyond_two_thousand_million_elements() -> None:
    rows, kv_heads, head_dim = 17, 8, 128
    blocks = 2**31 // (BLOCK_TOKENS * kv_heads * head_dim) + 8
    cache_bytes = 2 * 2 * blocks * BLOCK_TOKENS * kv_heads * head_dim
    if torch.cuda.mem_get_info()[0] < 2 * cache_bytes:
        pytest.skip("too little GPU memory")
    case = Case.of(rows, 16, kv_heads, head_dim, True, torch.bfloat16, "cuda")
    case.keys = torch.zeros(blocks, BLOCK_TOKENS, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
    case.values = torch.zeros_like(case.keys)
    case.places = blocks * BLOCK_TOKENS - 1 - torch.arange(rows, device="cuda")
    _, key, value = case.expected()
    case.run()
    assert_rounded(case.keys.view(-1, kv_heads, head_dim)[case.places], key, roundings=3)
    assert torch.equal(case.values.view(-1, kv_heads, head_dim)[case.places], value)
