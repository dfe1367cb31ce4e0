"""How many rows steps compute: enough, few different numbers, and the runner computes no others."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor.step import pack_u32
from penstock.executor.worker.device.prefill_graphs import PrefillGraphs
from penstock.executor.worker.device.program import MixedStep, Program
from penstock.executor.worker.device.sizes import (
    COARSE,
    GRAIN,
    MOST_MET,
    graph_size,
    graph_sizes,
    met_step_sizes,
    step_size,
)
from penstock.kernels.attention.decode_shapes import Spread
from support.by_hand import ByHand, Kind, admission, spec, start_of, started
from support.tiny_llama import TinyLlama, build_tiny_llama


@given(most=st.integers(1, 20_000), share=st.floats(0, 1))
def test_a_step_is_hardly_padded(most: int, share: float) -> None:
    rows = max(1, round(share * most))
    size = step_size(rows, most)
    assert rows <= size <= most
    assert size < rows + GRAIN


def test_a_step_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="a step of 1025 rows, there is room for 1024"):
        step_size(1025, 1024)


@given(most=st.integers(1, 20_000))
def test_the_start_meets_all_but_large_steps(most: int) -> None:
    sizes = met_step_sizes(most)
    assert sizes == sorted(set(sizes))
    assert {step_size(rows, most) for rows in range(1, min(most, MOST_MET) + 1)} <= set(sizes)
    assert max(sizes) <= most < max(sizes) + COARSE
    assert len(sizes) <= MOST_MET // GRAIN + most // COARSE + 1


@given(most=st.integers(1, 2_000), share=st.floats(0, 1))
def test_a_batch_has_the_next_size_that_is_captured(most: int, share: float) -> None:
    rows = round(share * most)
    assert graph_size(rows, most) == min(size for size in graph_sizes(most) if size >= rows)


@pytest.mark.parametrize(("prompt", "size"), [(1, 8), (9, 16), (57, 64), (130, 136)])
def test_the_runner_pads_steps_that_compute_known_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_kind: Kind, prompt: int, size: int
) -> None:
    launched: list[tuple[int, int | None, int]] = []
    mixed = Program.mixed

    def watched(self: Program, decodes: int, step: MixedStep, *, spread: Spread) -> int:
        if step.sample_slots.numel() and step.chosen is not None:
            launched.append((decodes + step.ids.numel(), step.chosen.numel(), step.sample_slots.numel()))
        return mixed(self, decodes, step, spread=spread)

    monkeypatch.setattr(Program, "mixed", watched)
    monkeypatch.setattr(PrefillGraphs, "sizes", lambda max_rows, slots: [])
    folder = build_tiny_llama(tmp_path, seed=21, shape=TinyLlama(eos_token_id=None))
    with started(spec(folder, **device_kind)) as (executor, _):
        launched.clear()
        plan = ByHand(executor)
        for slot in range(3):
            blocks = range(20 * slot, 20 * slot + 20)
            rows = list(range(slot + 1))
            start = start_of(slot, prompt, blocks, rows=pack_u32(rows))
            assert plan(admissions=(admission(slot, [slot + 3] * prompt),), **start).counts == bytes([1] * len(rows))
    assert launched[0] == (size, 1, 1)
    assert launched[2] == (step_size(prompt + 2, 1 << 20), 4, 3)
