"""A group of ranks, here threads over gloo: sums, messages, agreement; and the products that are spread over it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from penstock.executor.executor import ExecutorError
from penstock.executor.layers.linear import Linear
from penstock.executor.layers.parallel import ALONE, FRAME_BYTES, Backend, Group, GroupError
from penstock.executor.layers.placement import Placement
from penstock.executor.models.errors import CheckpointError
from penstock.kernels.batch.state import ArenaLayout, BatchState
from support.rank_threads import ranks

LIMIT_S = 60.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_broadcasts(dtype: torch.dtype) -> None:
    """Of whole numbers, which no order of adding rounds."""
    values = torch.randint(-9, 9, (3, 4, 7)).to(dtype)

    def work(group: Group) -> tuple[Tensor, Tensor]:
        return group.all_reduce(values[group.rank].clone()), group.broadcast(values[group.rank].clone(), 2)

    with ranks(3) as threads:
        for total, told in threads.each(work):
            assert torch.equal(total, values.sum(0))
            assert torch.equal(told, values[2])


def test_nothing_of_nothing() -> None:
    """A step of which no row goes on, and a group of one rank: the tensor comes back as it is."""
    with ranks(2) as threads:
        assert [part.shape for part in threads.each(lambda group: group.all_reduce(torch.empty(0, 8)))] == [(0, 8)] * 2
    x = torch.randn(3)
    assert ALONE.all_reduce(x) is ALONE.broadcast(x) is x
    assert ALONE.exchange(b"abc") == [b"abc"]
    assert ALONE.least(7) == 7
    ALONE.require_same("anything", "at all")
    with ALONE.together():
        pass


@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES - 9, FRAME_BYTES - 8, FRAME_BYTES - 7, 3 * FRAME_BYTES])
def test_bytes_of_any_length_arrive(size: int) -> None:
    data = bytes(number % 251 for number in range(size))

    def work(group: Group) -> bytes:
        if group.rank == 0:
            group.send(data)
            return data
        return group.receive()

    with ranks(3) as threads:
        assert threads.each(work) == [data] * 3
        assert threads.each(lambda group: group.exchange(data[: group.rank])) == [[data[:0], data[:1], data[:2]]] * 3


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ExecutorError("x.json: no such file"), "x.json: no such file"),
        (CheckpointError(Path("x"), "is truncated"), "x: is truncated"),
        (RuntimeError("not enough memory\nsecond line"), "RuntimeError: not enough memory"),
    ],
)
def test_a_fault_of_one_rank_is_raised_in_all(error: Exception, line: str) -> None:
    def work(group: Group) -> None:
        with group.together():
            if group.rank == 1:
                raise error

    with ranks(3) as threads:
        first, second, third = threads.faults(work)
        assert second is error
        assert str(first) == str(third) == f"rank 1: {line}"
        assert threads.each(lambda group: group.least(9 - group.rank)) == [7, 7, 7], "the group goes on"


def test_what_must_be_the_same_is_named() -> None:
    with ranks(2) as threads:
        threads.each(lambda group: group.require_same("the colour", "red"))
        faults = threads.faults(lambda group: group.require_same("the colour", ("red", "blue")[group.rank]))
        assert [str(fault) for fault in faults] == ["the colour is red in rank 0 and blue in rank 1"] * 2


def test_a_rank_that_parts_is_noticed_at_once_and_a_silent_one_at_the_deadline() -> None:
    with ranks(2) as threads:
        threads.groups[1].close()
        began = time.monotonic()
        with pytest.raises(GroupError, match="another rank of 2 is lost or does not answer: "):
            threads.groups[0].exchange(b"")
        assert time.monotonic() - began < 10
        with pytest.raises(GroupError, match="the group of 2 ranks has been closed"):
            threads.groups[1].receive()
        with pytest.raises(GroupError, match="the group of 2 ranks has no way for tensors on meta"):
            threads.groups[0].all_reduce(torch.empty(3, device="meta"))
    with ranks(2, seconds=1.0) as threads:
        with pytest.raises(GroupError, match="Timed out") as caught:
            threads.groups[1].receive()
        assert "\n" not in str(caught.value)


class Captured:
    """Stands for NCCL: it ends when nothing is left that has captured one of its operations."""

    def __init__(self) -> None:
        self.ending, self.dropped, self.ended = (threading.Event() for _ in range(3))

    def drop(self) -> None:
        """What a graph of a lost rank's waits for ends only once it is being aborted."""
        if self.ending.wait(LIMIT_S):
            self.dropped.set()

    def abort(self) -> None:
        self.ending.set()
        if self.dropped.wait(LIMIT_S):
            self.ended.set()


def test_a_group_ends_though_graphs_hold_its_operations() -> None:
    nccl = Captured()
    group = Group(0, 2, {"cuda": cast(Backend, nccl)})
    group.before_close(nccl.drop)
    group.close()
    assert nccl.ended.is_set()
    group.close()
    ALONE.before_close(nccl.drop)
    assert not ALONE._drops


def shares(group: Group, whole: Linear, kept: int) -> Linear:
    """This rank's part of a map whose inputs are spread."""
    spread = Linear(kept, whole.parts, place(group), bias=whole.bias is not None, partial=True)
    spread.weight.copy_(whole.weight[:, group.rank * kept : (group.rank + 1) * kept])
    if spread.bias is not None and whole.bias is not None:
        spread.bias.copy_(whole.bias)
    return spread


def place(group: Group = ALONE) -> Placement:
    return Placement(torch.float32, torch.device("cpu"), group=group)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_spread_inputs_is_the_whole_one_in_every_rank(bias: bool) -> None:
    """However it is asked for; bias and residual are in it once."""
    whole = Linear(12, {"o_proj": 5}, place(), bias=bias)
    whole.weight.normal_()
    if whole.bias is not None:
        whole.bias.normal_()
    x, stream = torch.randn(3, 12), torch.randn(3, 5)
    expected = linear(x, whole.weight, whole.bias)

    def work(group: Group) -> list[Tensor]:
        part, mine = shares(group, whole, 4), x[:, 4 * group.rank :][:, :4]
        residual = stream.clone()
        return [part(mine), part.in_parts(mine), part.onto(mine, residual) - stream, residual - stream]

    with ranks(3) as threads:
        for made in threads.each(work):
            for one in made:
                torch.testing.assert_close(one, expected)


def test_what_a_step_changes_by_itself_is_one_piece_of_the_state() -> None:
    """It is what rank 0 tells the others: the four columns, of all slots, and nothing else."""
    state = BatchState.allocate(ArenaLayout(5, 3, 5), torch.device("cpu"), scratch_block=7)
    before = state.arena.clone()
    columns = (state.live, state.last_token, state.computed, state.outputs)
    for number, column in enumerate(columns):
        column.copy_(torch.arange(6) + 10 * (number + 1))
    assert state.advanced.is_contiguous()
    assert torch.equal(state.advanced, torch.cat(columns))
    assert torch.equal(state.arena[state.advanced.numel() :], before[state.advanced.numel() :])
