"""A plan's differences change the words that they name, and no other.

``TRITON_INTERPRET=1`` runs the kernel without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.batch.state import LIVE, ArenaLayout, BatchState
from penstock.kernels.batch.update import apply_words
from support.devices import on_every_device


@on_every_device
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 3001])
def test_named_words_change(device: str, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    arena = torch.randint(-(2**31), 2**31, (5003,), generator=generator, dtype=torch.int32)
    offsets = torch.randperm(arena.numel(), generator=generator)[:count]
    values = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int32)
    expected = arena.clone()
    for offset, value in zip(offsets.tolist(), values.tolist(), strict=True):
        expected[offset] = value

    on_device = arena.to(device)
    apply_words(on_device, torch.stack((offsets.int(), values), dim=1).to(device))
    assert torch.equal(on_device.cpu(), expected)


@on_every_device
def test_words_reach_the_columns_that_the_layout_names(device: str) -> None:
    layout = ArenaLayout(slots=3, table_width=5, max_rows=4)
    state = BatchState.allocate(layout, torch.device(device), scratch_block=9)
    bits = int(torch.tensor(0.7).view(torch.int32))
    words = [
        (layout.offset("live") + 1, LIVE),
        (layout.offset("temperature") + 2, bits),
        (layout.seeds + 2 * 1 + 1, -5),
        (layout.block_tables + 5 * 2 + 3, 77),
        (layout.row_slots + 3, 1),
    ]
    apply_words(state.arena, torch.tensor(words, dtype=torch.int32, device=device))
    assert state.live.tolist() == [0, 1, 0, 0]
    assert state.temperature.tolist() == pytest.approx([0, 0, 0.7, 0])
    assert state.seeds.tolist() == [[0, 0], [0, -5], [0, 0], [0, 0]]
    assert state.block_tables.tolist() == [[0] * 5, [0] * 5, [0, 0, 0, 77, 0], [9] * 5]
    assert state.row_slots.tolist() == [3, 3, 3, 1]
