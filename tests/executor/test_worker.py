"""What a worker makes of single plans: who takes part, when the device stops, what fails alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.executor.step import Fragment, Sampling, StepResult, Stopping, pack_u32
from penstock.executor.worker.device import start
from penstock.executor.worker.device.program import Program
from penstock.executor.worker.device.runner import DeviceRunner
from support.by_hand import ByHand, Kind, admission, spec, start_of, started
from support.hand_scheduler import Request
from support.reference import greedy_tokens
from support.tiny_llama import TinyLlama, build_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyLlama(eos_token_id=None)
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=21, shape=shape)


def greedy(folder: Path, request: Request) -> list[int]:
    """What ``transformers`` makes of it, without regard to stop ids."""
    return greedy_tokens(folder, request.prompt, request.max_tokens)


NEIGHBOUR = Request([9, 8, 7, 6], 6)
FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "an id beyond the vocabulary": ({"admissions": (admission(1, [3, 320]),)}, "id 320 is outside"),
    "ids of odd length": ({"admissions": (admission(1, [3], packed=b"abc"),)}, "multiple of"),
    "no ids": ({"admissions": (admission(1, []),)}, "0 known ids"),
    "more ids than fit": ({"admissions": (admission(1, [3] * 513),)}, "do not fit 512 tokens"),
    "more ids than announced": ({"admissions": (admission(1, [3, 4], total_ids=1, prompt_ids=1),)}, "announced"),
    "a slot that is not there": ({"admissions": (admission(600, [3]),)}, "6 slots"),
    "an occupied slot": ({"admissions": (admission(1, [3]), admission(1, [4]))}, "occupied"),
    "too many stop ids": (
        {"admissions": (admission(1, [3], stopping=Stopping(9, 0, pack_u32(list(range(65))))),)},
        "65 stop ids",
    ),
    "a penalty": (
        {"admissions": (admission(1, [3], sampling=Sampling(presence_penalty=0.5)),)},
        "presence_penalty is not supported",
    ),
    "a temperature that is no float32": (
        {"admissions": (admission(1, [3], sampling=Sampling(temperature=1e39)),)},
        "without overflow",
    ),
    "a top_k that is no int64": ({"admissions": (admission(1, [3], sampling=Sampling(top_k=-(2**70))),)}, "verflow"),
    "an adapter": ({"admissions": (admission(1, [3], adapter=17),)}, "adapters are not supported"),
    "blocks for an empty slot": ({"block_slots": pack_u32([1]), "block_ids": pack_u32([5])}, "slot is empty"),
    "a block that is not there": (
        {"admissions": (admission(1, [3]),), "block_slots": pack_u32([1]), "block_ids": pack_u32([90])},
        "block 90, there are 90",
    ),
    "a table that is full": (
        {"admissions": (admission(1, [3]),), "block_slots": pack_u32([1] * 65), "block_ids": pack_u32([4] * 65)},
        "65 blocks, a table holds 64",
    ),
    "rows without a block": (
        {"admissions": (admission(1, [3]),), "schedule_slots": pack_u32([1]), "schedule_rows": pack_u32([1])},
        "no block for position 0",
    ),
    "more rows than known": (
        {
            "admissions": (admission(1, [3]),),
            "block_slots": pack_u32([1]),
            "block_ids": pack_u32([5]),
            "schedule_slots": pack_u32([1]),
            "schedule_rows": pack_u32([2]),
        },
        "2 rows from position 0 are scheduled, 1 ids are known",
    ),
    "no rows": (
        {
            "admissions": (admission(1, [3]),),
            "schedule_slots": pack_u32([1]),
            "schedule_rows": pack_u32([0]),
        },
        "0 rows from position 0",
    ),
    "an empty slot scheduled": (
        {"schedule_slots": pack_u32([1]), "schedule_rows": pack_u32([1])},
        "the slot is empty",
    ),
    "scheduled outside the rows": (
        {
            "admissions": (admission(1, [3]),),
            "schedule_slots": pack_u32([1]),
            "schedule_rows": pack_u32([1]),
            "rows": pack_u32([0]),
        },
        "not in the plan's rows",
    ),
    "twice in the rows": (
        {"admissions": (admission(1, [3]),), "rows": pack_u32([1, 0, 1])},
        "stands in the plan's rows twice",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_plan_for_one_slot_fails_that_slot_alone(name: str, folder: Path, kind: Kind) -> None:
    changes, reason = FAULTS[name]
    with started(spec(folder, **kind)) as (executor, _):
        plan = ByHand(executor)
        first = plan(
            admissions=(admission(0, NEIGHBOUR.prompt),),
            block_slots=pack_u32([0, 0]),
            block_ids=pack_u32([3, 1]),
            schedule_slots=pack_u32([0]),
            schedule_rows=pack_u32([4]),
            rows=pack_u32([0]),
        )
        bad = plan(**({"rows": pack_u32([1, 0])} | changes))
        after = [plan(rows=pack_u32([0])), *(plan() for _ in range(3))]
    assert [(failure.slot, reason in failure.reason) for failure in bad.failed] == [
        (600 if "600" in repr(changes.get("admissions")) else 1, True)
    ], bad.failed
    tokens = b"".join(result.ids for result in (first, bad, *after))
    assert tokens == pack_u32(greedy(folder, NEIGHBOUR))


def test_steps_that_the_start_has_launched_are_nobodys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step of few rows leaves its tokens is counted on the device, and by the host."""

    def after_steps(program: Program, *arguments: Any) -> DeviceRunner:
        assert program.few_rows is not None
        for _ in range(3):
            program.few_rows.run(1, 0)
        return DeviceRunner(program, *arguments)

    monkeypatch.setattr(start, "computes_few_rows", lambda device, dtype: True)
    monkeypatch.setattr(start, "DeviceRunner", after_steps)
    with started(spec(folder, resident=True)) as (executor, _):
        plan = ByHand(executor)
        first = plan(admissions=(admission(0, NEIGHBOUR.prompt),), **start_of(0, 4, [3, 1]))
        burst = plan(repeat=NEIGHBOUR.max_tokens - 1)
    assert first.ids + burst.ids == pack_u32(greedy(folder, NEIGHBOUR))


def test_a_failed_slot_is_inert_until_released(folder: Path, kind: Kind) -> None:
    with started(spec(folder, **kind)) as (executor, _):
        plan = ByHand(executor)
        begin: dict[str, object] = {
            "block_slots": pack_u32([2]),
            "block_ids": pack_u32([7]),
            "schedule_slots": pack_u32([2]),
            "schedule_rows": pack_u32([1]),
            "rows": pack_u32([2]),
        }
        bad = plan(admissions=(admission(2, [400]),), **begin)
        assert (bad.counts, bad.ids, len(bad.failed)) == (b"\0", b"", 1)
        again = plan(schedule_slots=pack_u32([2]), schedule_rows=pack_u32([1]))
        assert (again.counts, again.failed) == (b"\0", ())
        good = plan(release=pack_u32([2]), admissions=(admission(2, [40]),), **begin)
        assert (good.counts, good.failed) == (b"\1", ())


def test_the_device_counts_the_output_made_before_an_admission(folder: Path, kind: Kind) -> None:
    """A sequence of 4 prompt ids and 2 output ids that may have 4: two more, then nothing."""
    ids = NEIGHBOUR.prompt + greedy(folder, NEIGHBOUR)[:2]
    with started(spec(folder, **kind)) as (executor, _):
        plan = ByHand(executor)
        known = admission(3, ids, prompt_ids=4, stopping=Stopping(4))
        results = [plan(admissions=(known,), **start_of(3, 6, [8, 9])), *(plan() for _ in range(3))]
    assert [result.counts for result in results] == [b"\1", b"\1", b"\0", b"\0"]
    assert b"".join(result.ids for result in results) == pack_u32(greedy(folder, NEIGHBOUR)[2:4])


def test_a_slot_forgets_the_stop_ids_of_its_last_sequence(folder: Path, kind: Kind) -> None:
    expected = greedy(folder, NEIGHBOUR)
    stopping = Stopping(100, 0, pack_u32([1, expected[0], 2]))
    with started(spec(folder, **kind)) as (executor, _):
        plan = ByHand(executor)
        first = plan(admissions=(admission(0, NEIGHBOUR.prompt, stopping=stopping),), **start_of(0, 4, [5]))
        assert (first.ids, plan().counts) == (pack_u32(expected[:1]), b"\0")
        again = admission(0, NEIGHBOUR.prompt, stopping=Stopping(100, 0, pack_u32([1])))
        results = [plan(release=pack_u32([0]), admissions=(again,), **start_of(0, 4, [6])), plan(), plan()]
    assert b"".join(result.ids for result in results) == pack_u32(expected[:3])


def test_the_rows_of_a_plan_decide_who_takes_part(folder: Path, kind: Kind) -> None:
    expected = greedy(folder, NEIGHBOUR)
    with started(spec(folder, **kind)) as (executor, _):
        plan = ByHand(executor)
        plan(admissions=(admission(0, NEIGHBOUR.prompt),), **start_of(0, 4, [5, 6]))
        plan(admissions=(admission(1, NEIGHBOUR.prompt),), **start_of(1, 4, [7, 8], rows=pack_u32([1, 0])))
        alone = plan(rows=pack_u32([0]))
        both = plan(rows=pack_u32([0, 1]))
    assert alone.ids == pack_u32([expected[2]])
    assert both.ids == pack_u32([expected[3], expected[1]])


def test_a_bare_replay_leaves_the_batch_where_it_was(folder: Path, device_kind: Kind) -> None:
    def tokens(replayed: int) -> bytes:
        with started(spec(folder, **device_kind)) as (executor, _):
            plan = ByHand(executor)
            sampled = admission(0, NEIGHBOUR.prompt, sampling=Sampling(temperature=1.0), seed=7)
            before = plan(admissions=(sampled,), **start_of(0, 4, [5, 6, 7])), plan()
            runner = executor.runner
            assert isinstance(runner, DeviceRunner)
            assert len(runner.replay(1, replayed)) == replayed
            return b"".join(result.ids for result in (*before, *(plan() for _ in range(6))))

    assert tokens(replayed=5) == tokens(replayed=0)


def test_long_prompts_come_in_fragments(folder: Path, kind: Kind) -> None:
    request = Request(list(range(3, 60)), 4)
    ids, size = request.prompt, len(request.prompt)
    blocks = pack_u32(list(range(20)))
    with started(spec(folder, **kind)) as (executor, _):
        plan = ByHand(executor)

        def compute(count: int, **changes: object) -> StepResult:
            return plan(schedule_slots=pack_u32([4]), schedule_rows=pack_u32([count]), **changes)

        first = admission(4, ids[:10], total_ids=size, prompt_ids=size)
        compute(10, admissions=(first,), rows=pack_u32([4]), block_slots=pack_u32([4] * 20), block_ids=blocks)
        compute(5, fragments=(Fragment(4, 1, pack_u32(ids[10:20])),))
        last = compute(size - 15, fragments=(Fragment(4, 2, pack_u32(ids[20:])),))
        tokens = last.ids + plan().ids + plan().ids + plan().ids
        late = plan(fragments=(Fragment(4, 5, b""),))
    assert tokens == pack_u32(greedy(folder, request))
    assert "fragment 5 came where 3 was due" in late.failed[0].reason
