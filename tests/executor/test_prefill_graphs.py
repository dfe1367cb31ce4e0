"""Steps of short prompts by graphs: what a graph reads, which steps one takes, and the same tokens as without.

A recorder that does not capture stands in for CUDA's: what it gives back runs the work again, from the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.executor.step import ModelSpec, pack_u32
from penstock.executor.worker.device import start
from penstock.executor.worker.device.mirror import Chunk
from penstock.executor.worker.device.prefill_graphs import SEQUENCES, PrefillGraphs
from penstock.executor.worker.device.program import Program
from penstock.executor.worker.device.runner import DeviceRunner
from support.by_hand import ByHand, Kind, admission, spec, start_of, started
from support.tiny_llama import TinyLlama, build_tiny_llama


@dataclass
class Again:
    """A graph that computes by computing."""

    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


class FakeRecorder:
    def captured(self, work: Callable[[], None]) -> Again:
        work()
        return Again(work)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_llama(tmp_path, seed=21, shape=TinyLlama(eos_token_id=None))


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.gpu)], ids=["by hand", "captured"])
def replayed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Kind, list[int]]:
    """Settings with which short prompts go through graphs, and the sizes of those that were replayed."""
    sizes: list[int] = []
    compute = PrefillGraphs.compute

    def watched(self: PrefillGraphs, size: int, words: torch.Tensor) -> None:
        sizes.append(size)
        compute(self, size, words)

    monkeypatch.setattr(PrefillGraphs, "compute", watched)
    if request.param:
        return {"device": "cuda", "dtype": "float32"}, sizes
    made = PrefillGraphs

    def captured(program: Program) -> PrefillGraphs:
        graphs = made(program)
        if program.layout.slots >= SEQUENCES:
            with torch.inference_mode():
                graphs.capture(FakeRecorder(), lambda: None)  # type: ignore[arg-type]
        return graphs

    monkeypatch.setattr(start, "PrefillGraphs", captured)
    return {"device": "cpu", "resident": True}, sizes


def prompts_through(model: ModelSpec, lengths: list[int], chunk: int | None) -> list[bytes]:
    """What each of these prompts, all in one step or all in chunks of so many ids, and a few steps behind them make."""
    with started(model) as (executor, _):
        plan = ByHand(executor)
        slots = list(range(len(lengths)))
        first = [length if chunk is None else min(chunk, length) for length in lengths]
        blocks = [15 * slot + block for slot in slots for block in range(15)]
        made = [
            plan(
                admissions=tuple(
                    admission(slot, [slot + 5 + i % 7 for i in range(n)]) for slot, n in enumerate(lengths)
                ),
                block_slots=pack_u32([slot for slot in slots for _ in range(15)]),
                block_ids=pack_u32(blocks),
                schedule_slots=pack_u32(slots),
                schedule_rows=pack_u32(first),
                rows=pack_u32(slots),
            )
        ]
        rest = [(slot, lengths[slot] - first[slot]) for slot in slots if lengths[slot] > first[slot]]
        if rest:
            made.append(
                plan(schedule_slots=pack_u32([slot for slot, _ in rest]), schedule_rows=pack_u32([n for _, n in rest]))
            )
        made += [plan() for _ in range(3)]
        assert not any(result.failed for result in made)
        return [result.counts + result.ids for result in made]


@pytest.mark.parametrize(
    ("lengths", "chunk", "sizes"),
    [
        ([1], None, [16]),
        ([16], None, [16]),
        ([17, 40], None, [64]),
        ([100], 70, [96, 32]),
        ([3, 3, 3, 3], 2, [16, 16]),
        ([30, 9, 4], None, [64]),
        ([5, 5, 5, 5, 5], None, []),
    ],
)
def test_the_same_tokens_as_without(
    folder: Path, replayed: tuple[Kind, list[int]], lengths: list[int], chunk: int | None, sizes: list[int]
) -> None:
    settings, met = replayed
    met.clear()
    made = prompts_through(spec(folder, **settings), lengths, chunk)
    assert met == sizes
    assert made == prompts_through(spec(folder, device="cpu", resident=False), lengths, chunk)


def test_a_step_beside_decodes_is_not_taken(folder: Path, replayed: tuple[Kind, list[int]]) -> None:
    settings, met = replayed
    with started(spec(folder, **settings)) as (executor, _):
        plan = ByHand(executor)
        plan(admissions=(admission(0, [5] * 9),), **start_of(0, 9, range(5)))
        beside = start_of(1, 4, range(5, 9), rows=pack_u32([0, 1]))
        assert plan(admissions=(admission(1, [6] * 4),), **beside).counts == bytes([1, 1])
    assert met == [16]


def test_what_a_graph_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(spec(folder, device="cpu", resident=True)) as (executor, _):
        runner = executor.runner
        assert isinstance(runner, DeviceRunner)
        graphs = PrefillGraphs(runner._program)
        chunks = [
            Chunk(4, 7, np.array([11, 12, 13], np.int32), completes=False),
            Chunk(2, 0, np.array([21, 22], np.int32), completes=True),
        ]
        packed = graphs.pack(chunks, 16)
        fields = {name: packed[place].tolist() for name, place in graphs._fields(16).items()}
    nobody = 6
    assert fields == {
        "slots": [4, 2, nobody, nobody],
        "starts": [0, 3, 5, 5, 5],
        "contexts": [10, 2, 0, 0],
        "chosen": [4, 0, 0, 0],
        "owners": [2, nobody, nobody, nobody],
        "ids": [11, 12, 13, 21, 22] + [0] * 11,
        "positions": [7, 8, 9, 0, 1] + [0] * 11,
        "row_slots": [4, 4, 4, 2, 2] + [nobody] * 11,
    }
