"""What the host tells the device: differences, and few of them."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
import torch

from penstock.executor.executor import ExecutorError
from penstock.executor.step import ModelSpec, StepPlan, Stopping, pack_u32
from penstock.executor.worker.device.changes import Changes
from penstock.executor.worker.device.memory import Budget, count_device_blocks
from penstock.executor.worker.device.mirror import Mirror
from penstock.executor.worker.kv_cache import PageShape
from penstock.executor.worker.slots import Capacity
from penstock.kernels.batch.state import LIVE, ArenaLayout, BatchState
from support.by_hand import admission

SLOTS, BLOCK = 256, 64
CAPACITY = Capacity(SLOTS, 4096, BLOCK, 20_000, 1000)
LAYOUT = ArenaLayout(SLOTS, CAPACITY.table_width, SLOTS)


def device_state() -> BatchState:
    return BatchState.allocate(LAYOUT, torch.device("cpu"), scratch_block=CAPACITY.num_blocks)


def show(state: BatchState, changes: Changes) -> int:
    """Apply the changes; how many bytes they are."""
    words = changes.take()
    state.arena[torch.from_numpy(words[:, 0].astype(np.int64))] = torch.from_numpy(words[:, 1].copy())
    return words.nbytes


def test_steady_decodes_upload_a_few_words() -> None:
    """256 sequences of unaligned lengths for 200 steps, block borders included."""
    source, mirror, state = random.Random(3), Mirror(CAPACITY, LAYOUT), device_state()
    lengths = [source.randrange(100, 1000) for _ in range(SLOTS)]
    blocks = iter(range(CAPACITY.num_blocks))
    tables = [[next(blocks) for _ in range(-(-(length + 1) // BLOCK))] for length in lengths]
    order = sorted(range(SLOTS), key=lambda slot: -lengths[slot])
    plan = StepPlan(
        1,
        1,
        admissions=tuple(admission(slot, [1] * length, stopping=Stopping(2000)) for slot, length in enumerate(lengths)),
        block_slots=pack_u32([slot for slot, table in enumerate(tables) for _ in table]),
        block_ids=pack_u32([block for table in tables for block in table]),
        schedule_slots=pack_u32(list(range(SLOTS))),
        schedule_rows=pack_u32(lengths),
        rows=pack_u32(order),
    )
    mirror.apply(plan)
    assert len(mirror.compose(1).chunks) == SLOTS
    show(state, mirror.changes)
    assert state.live[:SLOTS].eq(LIVE).all()
    assert state.computed[:SLOTS].tolist() == [length - 1 for length in lengths]
    sent = []
    for step in range(200):
        grown = [slot for slot, length in enumerate(lengths) if (length + step) // BLOCK >= len(tables[slot])]
        for slot in grown:
            tables[slot].append(next(blocks))
        added = [tables[slot][-1] for slot in grown]
        mirror.apply(StepPlan(1, step + 2, block_slots=pack_u32(grown), block_ids=pack_u32(added)))
        assert mirror.compose(1).decodes.tolist() == order
        sent.append(show(state, mirror.changes))
    assert not mirror.failures
    assert state.row_slots.tolist() == order
    for slot, table in enumerate(tables):
        assert state.block_tables[slot, : len(table)].tolist() == table
    assert 0 < statistics.median(sent[1:]) < 200, "the first step also tells who decodes"
    assert max(sent[1:]) < 200


def test_a_burst_is_checked_for_blocks_as_far_as_it_counts() -> None:
    mirror = Mirror(CAPACITY, LAYOUT)
    start = StepPlan(
        1,
        1,
        admissions=(
            admission(0, [1] * 60, stopping=Stopping(4)),
            admission(1, [1] * 60, stopping=Stopping(9)),
        ),
        block_slots=pack_u32([0, 1]),
        block_ids=pack_u32([5, 6]),
        schedule_slots=pack_u32([0, 1]),
        schedule_rows=pack_u32([60, 60]),
        rows=pack_u32([0, 1]),
    )
    mirror.apply(start)
    mirror.compose(1)
    mirror.apply(StepPlan(1, 2, repeat=8))
    step = mirror.compose(8)
    assert step.decodes.tolist() == [0]
    assert [(failure.slot, failure.reason) for failure in mirror.failures] == [(1, "no block for position 67")]
    late = StepPlan(
        1,
        3,
        admissions=(admission(2, [1]),),
        schedule_slots=pack_u32([2]),
        schedule_rows=pack_u32([1]),
        rows=pack_u32([0, 2]),
    )
    mirror.apply(late)
    with pytest.raises(ValueError, match="burst"):
        mirror.compose(2)


def test_words_of_every_kind_arrive() -> None:
    mirror, state = Mirror(CAPACITY, LAYOUT), device_state()
    known = admission(7, [1, 2], seed=2**63 + 5, sample_index=2**32 - 1, stopping=Stopping(2**40, 3, pack_u32([9, 8])))
    mirror.apply(StepPlan(1, 1, admissions=(known,), rows=pack_u32([7])))
    show(state, mirror.changes)
    assert state.seeds[7].tolist() == [5, -(2**31)]
    assert state.sample_index[7].item() == -1
    assert (state.max_tokens[7].item(), state.min_tokens[7].item()) == (2**31 - 1, 3)
    assert state.stop_ids[7, : int(state.stop_count[7])].tolist() == [9, 8]
    assert state.temperature[7].item() == 0.0
    assert state.top_p[7].item() == 1.0


def test_too_little_memory_is_told_with_its_arithmetic() -> None:
    shape = PageShape(32, 64, 8, 128, torch.bfloat16)
    gib = 2**30
    budget = Budget(total=16 * gib, used=15 * gib, step=gib // 2, graphs=gib // 4, utilization=0.9)
    with pytest.raises(ExecutorError) as caught:
        count_device_blocks(ModelSpec(path="m"), shape, 8192, budget)
    said = str(caught.value)
    assert "one sequence of 8192 tokens needs 1.01 GiB of key/value pages, there are 0.00 GiB" in said
    assert "0.90 × 16.00 GiB − 15.00 GiB in use − 0.50 GiB a step − 0.25 GiB for graphs" in said
    assert "\n" not in said
    plenty = Budget(total=141 * gib, used=16 * gib, step=gib, graphs=gib, utilization=0.9)
    blocks = count_device_blocks(ModelSpec(path="m", max_sequences=256), shape, 8192, plenty)
    assert blocks == plenty.room // shape.block_bytes - 1
    assert count_device_blocks(ModelSpec(path="m", max_sequences=4), shape, 8192, plenty) == 4 * 128
    with pytest.raises(ExecutorError, match="99999 blocks"):
        count_device_blocks(ModelSpec(path="m", num_blocks=99_999), shape, 8192, plenty)
