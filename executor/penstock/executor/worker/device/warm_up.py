"""Whatever a step may launch, launched once before the first plan.

A kernel is compiled when it is launched for the first time, which takes up to a second, unless an earlier run has left
it in Triton's cache: whoever's request comes first would wait. Which kernels a step launches depends on its numbers of
rows: of all, of those that decode, and of those whose next token is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import torch

from penstock.executor.worker.device.attention import ChunkRows
from penstock.executor.worker.device.program import MixedStep, Program
from penstock.kernels.attention.decode_shapes import DecodeShape, Spread
from penstock.kernels.batch.state import NOT_LIVE
from penstock.kernels.overlap import overlap_pays

STEPS: Final = (
    (8, 8), (16, 16), (24, 24), (36, 36), (64, 64), (96, 8), (96, 16), (96, 36), (96, 64), (600, 48), (600, 100)
)  # fmt: skip
"""Rows of a chunk and how many of them are chosen: of each way in which kernels take few rows, one."""


def warm_up(program: Program, max_step_tokens: int, longest: int) -> None:
    """Launch each kernel that steps of up to ``max_step_tokens`` known ids may need; no slot may be live.

    ``longest``: most tokens of a sequence. Full steps come first: they take the most memory.
    """
    run_full_step(program, max_step_tokens, longest)
    live_nobody = program.layout.offset("live") + program.layout.slots
    program.apply(torch.tensor([live_nobody, NOT_LIVE], dtype=torch.int32, device=program.state.arena.device))
    for most, some in STEPS:
        rows = min(most, max_step_tokens)
        chosen = min(some, rows, program.layout.slots)
        _run_step(program, 0, _split(rows, longest), chosen, filtered=(False,))
    for rows, spread in _kinds_of_decodes(program):
        program.decode(rows, spread=spread)
        for filtered in (False, True):
            program.choose(rows, filtered=filtered)


def run_full_step(program: Program, max_step_tokens: int, longest: int) -> None:
    """A step of as many rows and samples as there can be."""
    slots = program.layout.slots
    _run_step(program, slots, _split(max_step_tokens, longest), slots, filtered=(False, True))


def _split(rows: int, longest: int) -> list[int]:
    """Chunks of at most ``longest`` rows."""
    starts = [*range(0, rows, longest), rows]
    return [end - start for start, end in pairwise(starts)]


def _kinds_of_decodes(program: Program) -> Iterator[tuple[int, Spread]]:
    """One batch of each kind that attention tells apart."""
    met: set[tuple[DecodeShape, bool]] = set()
    for spread in Spread:
        for rows in range(1, program.layout.slots + 1):
            kind = program.decode_shape(rows, spread), overlap_pays(rows, program.row_size)
            if kind not in met:
                met.add(kind)
                yield rows, spread


def _run_step(program: Program, decodes: int, lengths: Sequence[int], chosen: int, *, filtered: Sequence[bool]) -> None:
    """``decodes`` rows and chunks of ``lengths``, all of the slot that is nobody's; ``chosen`` rows sample."""
    nobody, device = program.layout.slots, program.state.arena.device

    def column(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    positions = torch.cat([torch.arange(length, dtype=torch.int32, device=device) for length in lengths])
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    step = MixedStep(
        ids=torch.zeros_like(positions),
        positions=positions,
        slots=torch.full_like(positions, nobody),
        chunks=ChunkRows(column([nobody] * len(lengths)), column(ends), column(lengths), max(lengths)),
        chosen=torch.arange(chosen, dtype=torch.int32, device=device),
        sample_slots=column([nobody] * chosen),
    )
    for some in filtered:
        program.mixed(decodes, step, spread=Spread.MIXED)
        program.choose_mixed(step, filtered=some)
