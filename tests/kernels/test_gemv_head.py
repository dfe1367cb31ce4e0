"""Begin and end of a step of few rows: the same tokens as the sampling tail's, from the same seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.batch.state import LIVE, ArenaLayout, BatchState
from penstock.kernels.gemv.attention import FewRows
from penstock.kernels.gemv.begin import begin_step, begin_step_reference
from penstock.kernels.gemv.head import KEPT, FewTokens, head_and_choice, head_and_choice_reference
from penstock.kernels.gemv.product import Norm
from penstock.kernels.gemv.shapes import GemvShape
from penstock.kernels.sampling.tail import FAILED, INERT, MADE
from support.devices import on_every_kernel

HIDDEN, SLOTS = 64, 6
SHAPES = [GemvShape(16, 64, 2, 1), GemvShape(8, 32, 1, 2)]


def drawn_state(vocabulary: int, rows: int, device: str, seed: int) -> BatchState:
    """Slots of every kind: greedy, warm and cold ones, before and after their min_tokens, near their ends."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    state = BatchState.allocate(ArenaLayout(SLOTS, 2, 8), torch.device(device), scratch_block=3)
    state.live[:SLOTS] = LIVE
    state.computed[:SLOTS] = whole(0, 100, SLOTS).int()
    state.last_token[:SLOTS] = whole(0, vocabulary, SLOTS).int()
    state.temperature[:SLOTS] = torch.tensor([0.0, 0.7, 1.0, 1e-30, 2.0, 0.3], device=device)
    state.seeds[:SLOTS] = whole(-(2**31), 2**31 - 1, SLOTS, 2).int()
    state.sample_index[:SLOTS] = whole(0, 5, SLOTS).int()
    state.max_tokens[:SLOTS] = whole(1, 4, SLOTS).int()
    state.min_tokens[:SLOTS] = whole(0, 4, SLOTS).int()
    state.outputs[:SLOTS] = whole(0, 3, SLOTS).int()
    state.stop_count[:SLOTS] = whole(0, 64, SLOTS).int()
    state.stop_ids[:SLOTS] = whole(0, vocabulary, SLOTS, state.stop_ids.shape[1]).int()
    state.row_slots[:rows] = torch.randperm(SLOTS, generator=generator)[:rows].int().to(device)
    return state


def tokens_of(vocabulary: int, rows: int, device: str, dtype: torch.dtype) -> FewTokens:
    out = FewTokens.allocate(rows, torch.zeros(rows, vocabulary, dtype=dtype, device=device))
    for scratch in (out.logits, out.peaks, out.masses):
        scratch.fill_(float("nan"))
    out.kept.fill_(-7)
    out.steps.fill_(KEPT + 3)
    return out


@on_every_kernel
@pytest.mark.parametrize(
    ("rows", "vocabulary", "shape"), [(4, 1003, SHAPES[0]), (1, 1024, SHAPES[0]), (2, 300, SHAPES[1])], ids=str
)
def test_chooses_as_the_reference(device: str, rows: int, vocabulary: int, shape: GemvShape) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    agreed = 0
    seeds = 20 if device == "cuda" else 2
    for seed in range(seeds):
        torch.manual_seed(seed)
        stream = torch.randn(rows, HIDDEN, device=device).to(dtype)
        head = torch.randn(vocabulary, HIDDEN, device=device).to(dtype) * 0.2
        norm = Norm(torch.rand(HIDDEN, device=device).to(dtype), 1e-6)
        states = [drawn_state(vocabulary, rows, device, seed) for _ in range(2)]
        for state in states:
            state.live[2] = seed % 2
        outs = [tokens_of(vocabulary, rows, device, dtype) for _ in range(2)]
        head_and_choice(stream, head, norm, states[0], outs[0], shape, rows)
        head_and_choice_reference(stream, head, norm, states[1], outs[1], rows)
        assert torch.allclose(
            outs[0].logits.float(), outs[1].logits.float(), atol=5e-2 if dtype != torch.float32 else 1e-5
        )
        same = torch.equal(outs[0].kept, outs[1].kept)
        agreed += same
        if same:
            assert torch.equal(states[0].arena, states[1].arena)
        assert (outs[0].kept[[n for n in range(KEPT) if n != 2]] == -7).all(), "the step's own place alone"
    # In bfloat16 two roundings of one logit may choose differently.
    assert agreed == seeds if device != "cuda" else agreed >= 0.7 * seeds


@on_every_kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a kernel is interpreted
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_fails_alone(device: str, poison: float) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    head, norm = torch.randn(600, HIDDEN, device=device).to(dtype), Norm(None, 1e-6)
    state = drawn_state(600, 3, device, 0)
    state.row_slots[:3] = torch.tensor([0, 1, SLOTS], device=device).int()
    stream = torch.randn(3, HIDDEN, device=device).to(dtype)
    stream[1, 5] = poison
    out = tokens_of(600, 3, device, dtype)
    head_and_choice(stream, head, norm, state, out, SHAPES[0], 3)
    assert out.kept[2, 1].tolist() == [MADE, FAILED, INERT]
    assert state.live[1] == 0


@on_every_kernel
def test_begins_as_the_reference(device: str) -> None:
    embedding = torch.randn(50, 96, device=device)
    state = drawn_state(50, 4, device, 3)
    state.live[state.row_slots[1].long()] = 0
    state.row_slots[3] = SLOTS
    made = []
    for begin in (begin_step, begin_step_reference):
        column = torch.full((4,), -7, dtype=torch.int32, device=device)
        rows = FewRows(column, column.clone(), torch.full((4, 96), float("nan"), device=device))
        steps = torch.tensor([41], dtype=torch.int32, device=device)
        begin(state, embedding, rows, steps, 4)
        made.append((rows.positions.tolist(), rows.tables.tolist(), rows.stream.tolist(), steps.tolist()))
    assert made[0] == made[1]
    assert made[0][1][3] == made[0][1][1] == SLOTS
    assert made[0][3] == [42]
