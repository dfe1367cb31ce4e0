"""The rows of a step, against their definition slot by slot.

``TRITON_INTERPRET=1`` runs the kernels without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.batch.gather import StepRows, fill_rows, gather_rows
from penstock.kernels.batch.state import LIVE, NOT_LIVE, ArenaLayout, BatchState
from support.devices import on_every_device

POISON = -77
"""Where nothing was written."""
SCRATCH = 5000


def random_state(slots: int, block_tokens: int, device: str, *, width: int = 7) -> BatchState:
    """Most slots live, block tables shuffled, more rows than slots, some of them padding."""
    generator = torch.Generator().manual_seed(slots)

    def integers(top: int, *shape: int) -> torch.Tensor:
        return torch.randint(top, shape, generator=generator, dtype=torch.int32).to(device)

    state = BatchState.allocate(ArenaLayout(slots, width, slots + 20), torch.device(device), SCRATCH)
    state.live[:slots] = torch.where(integers(4, slots) > 0, LIVE, NOT_LIVE)
    state.last_token[:slots] = integers(150_000, slots)
    state.computed[:slots] = integers(width * block_tokens, slots)
    state.computed[0] = width * block_tokens - 1
    blocks = torch.randperm(slots * width, generator=generator).int().to(device)
    state.block_tables[:slots] = blocks.view(slots, width)
    state.row_slots.copy_(integers(slots + 1, slots + 20))
    state.row_slots[0] = 0
    return state


def poisoned_rows(count: int, device: str) -> StepRows:
    out = StepRows.allocate(count, torch.device(device))
    for column in (out.ids, out.positions, out.context_lengths, out.slot_mapping):
        column.fill_(POISON)
    return out


def columns(out: StepRows) -> list[tuple[int, int, int, int]]:
    """(id, position, context, place) of each row."""
    found = (out.ids, out.positions, out.context_lengths, out.slot_mapping)
    return list(zip(*(column.tolist() for column in found), strict=True))


def decode_row(state: BatchState, row: int, block_tokens: int) -> tuple[int, int, int, int]:
    slot = int(state.row_slots[row])
    if state.live[slot] != LIVE:
        return 0, 0, 0, SCRATCH * block_tokens
    position = int(state.computed[slot])
    block = int(state.block_tables[slot, position // block_tokens])
    return int(state.last_token[slot]), position, position + 1, block * block_tokens + position % block_tokens


@on_every_device
@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize(("slots", "rows"), [(1, 1), (1, 5), (6, 0), (130, 127), (130, 128), (300, 261)])
def test_decode_rows(device: str, block_tokens: int, slots: int, rows: int) -> None:
    state = random_state(slots, block_tokens, device)
    before = state.arena.clone()
    out = poisoned_rows(rows + 3, device)
    gather_rows(state, rows, block_tokens, out)
    expected = [decode_row(state, row, block_tokens) for row in range(rows)]
    assert columns(out) == expected + [(POISON,) * 4] * 3
    assert torch.equal(state.arena, before)


@on_every_device
@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (3, 0), (1, 129), (16, 128), (7, 300)])
def test_rows_of_chunks(device: str, block_tokens: int, first: int, count: int) -> None:
    """They do not ask whether their slots are live: these do not decode yet."""
    slots, width = 9, 7
    state = random_state(slots, block_tokens, device, width=width)
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(150_000, (count,), generator=generator, dtype=torch.int32)
    positions = torch.randint(width * block_tokens, (count,), generator=generator, dtype=torch.int32)
    of = torch.randint(slots, (count,), generator=generator, dtype=torch.int32)
    out = poisoned_rows(first + count + 2, device)

    fill_rows(state, out, first, ids.to(device), positions.to(device), of.to(device), block_tokens)
    tables = state.block_tables.tolist()
    expected = [
        (token, position, POISON, tables[slot][position // block_tokens] * block_tokens + position % block_tokens)
        for token, position, slot in zip(ids.tolist(), positions.tolist(), of.tolist(), strict=True)
    ]
    assert columns(out) == [(POISON,) * 4] * first + expected + [(POISON,) * 4] * 2


@on_every_device
def test_places_beyond_32_bits(device: str) -> None:
    state = random_state(2, 64, device)
    state.live[0] = LIVE
    state.block_tables[0] = 2**31 - 1
    out = poisoned_rows(2, device)
    gather_rows(state, 1, 64, out)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    fill_rows(state, out, 1, one, one + 5, one, 64)
    assert out.slot_mapping.tolist() == [(2**31 - 1) * 64 + 63, (2**31 - 1) * 64 + 5]


@pytest.mark.gpu
def test_a_recorded_gather_follows_the_state() -> None:
    state = random_state(40, 16, "cuda")
    out = poisoned_rows(50, "cuda")
    gather_rows(state, 50, 16, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather_rows(state, 50, 16, out)
    for _ in range(3):
        state.computed.add_(1).remainder_(7 * 16)
        state.live[: state.layout.slots].bitwise_xor_(1)
        graph.replay()
        assert columns(out) == [decode_row(state, row, 16) for row in range(50)]
