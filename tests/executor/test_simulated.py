"""The simulated executor: its answers can be computed by hand, and a wrong block shows."""

import select
import time

import pytest

from penstock.executor.executor import ExecutorError
from penstock.executor.simulated import SimulatedDevice, SimulatedExecutor, answer, describe
from penstock.executor.step import Admission, ModelSpec, Sampling, StepPlan, Stopping, pack_u32, unpack_u32

SPEC = ModelSpec(
    path="/nonexistent", vocab_size=1000, block_tokens=4, num_blocks=8, max_sequences=2, max_model_tokens=32
)


def admission(ids: list[int], max_tokens: int = 9, min_tokens: int = 0, stop_ids: list[int] | None = None) -> Admission:
    stopping = Stopping(max_tokens, min_tokens, pack_u32(stop_ids or []))
    return Admission(0, pack_u32(ids), len(ids), len(ids), Sampling(), stopping, 1)


def first_plan(ids: list[int], blocks: list[int], **conditions: int | list[int]) -> StepPlan:
    return StepPlan(
        1,
        1,
        admissions=(admission(ids, **conditions),),  # type: ignore[arg-type]
        block_slots=pack_u32([0] * len(blocks)),
        block_ids=pack_u32(blocks),
        schedule_slots=pack_u32([0]),
        schedule_rows=pack_u32([len(ids)]),
        rows=pack_u32([0]),
    )


def test_the_answer_by_hand() -> None:
    # h = 0·31 + 4 + 1 = 5; h = 5·31 + 9 + 1 = 165
    assert answer([4], 1000) == 5
    assert answer([4, 9], 1000) == 165
    assert answer([4, 9], 1000, [165, 166]) == 167


def test_a_device_answers_through_its_blocks() -> None:
    device = SimulatedDevice(describe(SPEC))
    ids = [4, 9, 2, 7, 5]
    result = device.execute(first_plan(ids, [6, 3]))
    for number in range(2, 5):
        (token,) = unpack_u32(result.ids)
        assert token == answer(ids, 1000)
        ids.append(token)
        grown = [0] * (number == 4)
        result = device.execute(StepPlan(1, number, block_slots=pack_u32(grown), block_ids=pack_u32(grown)))


def test_a_block_given_to_two_changes_the_answer() -> None:
    device = SimulatedDevice(describe(SPEC))
    device.execute(first_plan([4, 9], [6]))
    intruder = Admission(1, pack_u32([1, 1, 1]), 3, 3, Sampling(), Stopping(9), 1)
    result = device.execute(
        StepPlan(
            1,
            2,
            admissions=(intruder,),
            block_slots=pack_u32([1]),
            block_ids=pack_u32([6]),
            schedule_slots=pack_u32([1]),
            schedule_rows=pack_u32([3]),
            rows=pack_u32([1, 0]),
        )
    )
    assert unpack_u32(result.ids)[1] != answer([4, 9, 165], 1000)


@pytest.mark.parametrize(
    ("conditions", "made"),
    [({"max_tokens": 1}, 1), ({"stop_ids": [165]}, 1), ({"stop_ids": [165], "min_tokens": 2, "max_tokens": 3}, 3)],
)
def test_the_device_stops(conditions: dict[str, int | list[int]], made: int) -> None:
    device = SimulatedDevice(describe(SPEC))
    counts = [device.execute(first_plan([4, 9], [6, 5], **conditions)).counts]
    counts += [device.execute(StepPlan(1, number)).counts for number in range(2, 6)]
    assert sum(count[0] for count in counts) == made


def test_a_taken_slot_is_refused() -> None:
    device = SimulatedDevice(describe(SPEC))
    device.execute(first_plan([4, 9], [6]))
    with pytest.raises(ExecutorError, match="taken"):
        device.execute(first_plan([4, 9], [5]))


def test_the_pace_is_kept_and_the_descriptor_tells() -> None:
    executor = SimulatedExecutor()
    executor.start(ModelSpec(path="/nonexistent", step_us=200_000), lambda stage, done, total: None)
    start = time.monotonic()
    executor.submit(first_plan([4, 9], [6]))
    executor.submit(StepPlan(1, 2))
    assert executor.results() == []
    assert select.select([executor.fileno()], [], [], 5)[0]
    assert [result.number for result in executor.results()] == [1]
    assert 0.2 <= time.monotonic() - start < 0.3
    assert select.select([executor.fileno()], [], [], 5)[0]
    assert [result.number for result in executor.results()] == [2]
    assert time.monotonic() - start >= 0.4
    assert not select.select([executor.fileno()], [], [], 0.05)[0]
    executor.shutdown()
    executor.shutdown()


def test_where_every_token_would_end_it_one_is_made_all_the_same() -> None:
    assert answer([0], 4, range(4)) == 1
