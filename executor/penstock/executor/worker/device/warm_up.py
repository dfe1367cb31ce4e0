"""Whatever a step may launch, launched once before the first plan.

A kernel is compiled when it is launched for the first time, which takes up to a second, unless an earlier run has left
it in Triton's cache; one of the matrix library is loaded then, which takes milliseconds. Whoever's request comes first
would wait. Which kernels a step launches depends on its numbers of rows: of all, of those that decode, and of those
whose next token is chosen. Two layers show them all (:meth:`Program.shallow`). Nearly all are compiled side by side
first (:mod:`penstock.kernels.ahead`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch

from penstock.executor.worker.device.attention import ChunkRows
from penstock.executor.worker.device.program import MixedStep, Program
from penstock.executor.worker.device.sizes import graph_sizes, met_step_sizes
from penstock.kernels.ahead import can_compile_ahead, compiled_ahead
from penstock.kernels.attention.decode_shapes import DecodeShape, Spread
from penstock.kernels.batch.state import NOT_LIVE
from penstock.kernels.norm import late_pays
from penstock.kernels.overlap import overlap_pays

MOST_COMPILED = 160
"""Rows of a step up to which all sizes are met for compiling ahead: others need hardly another kernel."""


def warm_up(program: Program, max_step_tokens: int, longest: int) -> None:
    """Launch each kernel that steps of up to ``max_step_tokens`` known ids may need; no slot may be live.

    ``longest``: most tokens of a sequence. Of what is launched full steps come first: they take the most memory.
    """
    part = program.shallow()
    if can_compile_ahead():
        with compiled_ahead(program.state.arena.device):
            _meet_steps(part, _sizes_to_compile(program.max_rows), longest)
    run_full_step(program.shallow(3), max_step_tokens, longest)
    part.meet_prefill()
    _meet_steps(part, met_step_sizes(program.max_rows), longest)


def _meet_steps(part: Program, sizes: Sequence[int], longest: int) -> None:
    """Steps of known ids of all ``sizes``, of all numbers of samples, and all kinds of decode steps."""
    live_nobody = part.layout.offset("live") + part.layout.slots
    part.apply(torch.tensor([live_nobody, NOT_LIVE], dtype=torch.int32, device=part.state.arena.device))
    for rows in sizes:
        _run_step(part, 0, _split(rows, longest))
    for rows, samples in _samples_of_steps(part, sizes):
        _run_step(part, 0, _split(rows, longest), samples)
    for rows, spread in _kinds_of_decodes(part):
        part.decode(rows, spread=spread)
        for filtered in (False, True):
            part.choose(rows, filtered=filtered)
    few = part.few_rows
    if few is None:
        return
    for rows, context in few.shapes:
        few.run(rows, context)


def _sizes_to_compile(max_rows: int) -> list[int]:
    """Few sizes that need nearly all kernels that steps of all of them do."""
    sizes = met_step_sizes(max_rows)
    return [size for size in sizes if size <= MOST_COMPILED] + sizes[-1:]


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


def _samples_of_steps(program: Program, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows and samples of steps of ``sizes``: each number of samples, after each way to normalise."""
    for samples in graph_sizes(program.layout.slots):
        met: set[bool] = set()
        for rows in sizes:
            late = late_pays(rows, program.row_size)
            if rows >= samples and late not in met:
                met.add(late)
                yield rows, samples


def _run_step(
    program: Program, decodes: int, lengths: Sequence[int], samples: int = 0, *, filtered: Sequence[bool] = (False,)
) -> None:
    """``decodes`` rows and chunks of ``lengths``, all of the slot that is nobody's; without ``samples`` all go on."""
    nobody, device = program.layout.slots, program.state.arena.device

    def column(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    positions = torch.cat([torch.arange(length, dtype=torch.int32, device=device) for length in lengths])
    step = MixedStep(
        ids=torch.zeros_like(positions),
        positions=positions,
        slots=torch.full_like(positions, nobody),
        chunks=ChunkRows(
            column([nobody] * len(lengths)), column([0, *accumulate(lengths)]), column(lengths), max(lengths), cached=0
        ),
        chosen=torch.arange(samples, dtype=torch.int32, device=device) if samples else None,
        sample_slots=column([nobody] * samples),
    )
    if program.mixed(decodes, step, spread=Spread.MIXED):
        for some in filtered:
            program.choose_mixed(step, filtered=some)
