"""Prefill attention against the definition, written out in float64, over pages that are NaN wherever nobody wrote.

``TRITON_INTERPRET=1`` runs the kernel without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.attention.prefill import paged_prefill_attention
from support.devices import on_every_device
from support.prefill_cases import NAN, NARROW, Case, Lengths

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, NARROW], ids=str)


@on_every_device
@DTYPES
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "block_tokens"),
    [(2, 2, 128, 64), (1, 4, 128, 16), (3, 1, 64, 32), (1, 3, 80, 64), (1, 5, 96, 16), (1, 8, 64, 64), (2, 1, 256, 64)],
)
def test_equals_the_definition(
    device: str, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, block_tokens: int
) -> None:
    lengths = [(0, 17), (63, 2), (64, 1), (5, 0), (50, 33), (0, 1), (129, 70)]
    case = Case(
        lengths,
        device=device,
        dtype=dtype,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        block_tokens=block_tokens,
    )
    case.assert_right(case.attend())


@on_every_device
@DTYPES
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("cached", [0, 1, 62, 63, 64, 127])
def test_ends_of_tiles(device: str, dtype: torch.dtype, cached: int, rows: int) -> None:
    """The first row sees the cached prefix and itself, the last one all, whatever the tiles are."""
    case = Case([(cached, rows)], device=device, dtype=dtype, group=1)
    case.assert_right(case.attend())


@on_every_device
def test_allocates_its_output(device: str) -> None:
    case = Case([(3, 4), (0, 9)], device=device, dtype=torch.float32)
    tables = (case.tables, case.slots, case.starts, case.contexts, case.longest)
    case.assert_right(paged_prefill_attention(case.query, case.keys, case.values, *tables, case.scale))


@on_every_device
@DTYPES
def test_a_longer_bound_changes_nothing(device: str, dtype: torch.dtype) -> None:
    """``max_query`` may be more than any sequence has."""
    case = Case([(3, 20), (0, 9)], device=device, dtype=dtype)
    case.longest = 300
    case.assert_right(case.attend())


@on_every_device
@DTYPES
def test_writes_its_own_rows_only(device: str, dtype: torch.dtype) -> None:
    case = Case([(20, 30), (0, 3)], device=device, dtype=dtype)
    around = torch.full((50, *case.query.shape[1:]), NAN, dtype=dtype, device=device)
    case.assert_right(case.attend(around[7:40]))
    assert around[:7].isnan().all()
    assert around[40:].isnan().all()


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(8, 2, 128), (8, 4, 128), (2, 4, 64), (2, 2, 256)], ids=str
)
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([(0, 1024)] * 4, id="4 of 1024"),
        pytest.param([(0, 4096)], id="1 of 4096"),
        pytest.param([(4096, 512), (1000, 512)], id="512 over 4096"),
        pytest.param([(0, 7), (3000, 1), (777, 333), (0, 2049), (64, 64)], id="mixed"),
    ],
)
def test_real_shapes(dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, lengths: Lengths) -> None:
    case = Case(lengths, device="cuda", dtype=dtype, kv_heads=kv_heads, group=group, head_dim=head_dim)
    case.assert_right(case.attend())


@pytest.mark.gpu
def test_blocks_far_into_a_large_cache() -> None:
    """Offsets beyond 2³¹ elements."""
    case = Case([(100, 200), (0, 30)], device="cuda", dtype=torch.bfloat16, kv_heads=8, head_dim=128)
    far = 2**31 // case.keys[0].numel() + 5
    for name in ("keys", "values"):
        near = getattr(case, name)
        large = torch.empty(far + near.shape[0], *near.shape[1:], dtype=near.dtype, device="cuda")
        large[far:] = near
        setattr(case, name, large)
    case.tables += far
    case.assert_right(case.attend())
