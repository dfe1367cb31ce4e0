"""Bursts: when a plan is one, what it reserves, and what its result means."""

import time

import pytest

from penstock.executor.simulated import SimulatedDevice, SimulatedExecutor
from penstock.executor.step import Admission, ModelSpec, Sampling, StepPlan, StepResult, Stopping, pack_u32, unpack_u32
from penstock.scheduler.core.bursts import DEADLINE_NS
from penstock.scheduler.records.events import Finish
from support.core_driver import Driver, undisturbed


def decoding(
    *prompts: int, depth: tuple[int, int] = (1, 0), most: int = 100, slots: int = 16, blocks: int = 40
) -> Driver:
    """A driver with sequences, numbered from 0, of those lengths, that are about to decode; bursts are 8 steps."""
    driver = Driver(*depth, max_repeat=8, step_tokens=100, slots=slots, blocks=blocks)
    for handle, length in enumerate(prompts):
        driver.submit(handle, range(length), most)
    driver.plan()
    driver.absorb()
    return driver


def next_repeat(driver: Driver) -> int:
    plan = driver.plan()
    assert plan is not None
    return plan.repeat


def test_a_steady_batch_runs_in_bursts_and_each_brings_eight_tokens_a_row() -> None:
    driver = decoding(5, 9)
    assert next_repeat(driver) == 8
    assert driver.answers[0].counts == bytes([8, 8])
    driver.absorb()
    assert [len(driver.outputs[handle]) for handle in (0, 1)] == [9, 9]
    driver.run()
    assert driver.outputs == {0: undisturbed(range(5), 100), 1: undisturbed(range(9), 100)}
    assert driver.bursts >= 12
    assert driver.at_rest()


def test_bursts_follow_one_another_while_the_one_before_is_in_flight() -> None:
    driver = decoding(5, depth=(2, 1))
    assert [next_repeat(driver), next_repeat(driver)] == [8, 8]
    sequence = driver.core._sequences[0]
    assert (sequence.ahead, sequence.sampled_by, sequence.scheduled) == (16, 2, 21)
    driver.run()
    assert driver.outputs[0] == undisturbed(range(5), 100)


def test_nobody_asked_for_bursts() -> None:
    driver = decoding(5)
    driver.max_repeat = 1
    assert next_repeat(driver) == 1


def test_who_enters_is_not_in_a_burst() -> None:
    driver = decoding(5)
    driver.submit(1, range(7), 20)
    assert next_repeat(driver) == 1
    driver.absorb()
    assert next_repeat(driver) == 8


def test_while_a_prompt_is_computed_there_are_no_bursts() -> None:
    driver = decoding(5)
    driver.submit(1, range(150), 20)
    assert [next_repeat(driver), len(unpack_u32(driver.plans[-1].schedule_slots))] == [1, 1]
    driver.absorb()
    assert [next_repeat(driver), len(unpack_u32(driver.plans[-1].schedule_slots))] == [1, 1]
    driver.absorb()
    assert next_repeat(driver) == 8


def test_while_a_prompt_finds_no_rows_there_are_no_bursts() -> None:
    driver = Driver(4, 0, step_tokens=2, max_repeat=8)
    driver.submit(0, [5], 40)
    driver.submit(1, [9], 40)
    driver.plan()
    driver.submit(2, range(7), 40)
    driver.plan()
    driver.absorb()
    driver.absorb()
    driver.plan()
    driver.absorb()
    assert next_repeat(driver) == 1
    assert not driver.plans[-1].schedule_slots, "those who decode take both rows"
    assert driver.core._sequences[2].scheduled == 2


def test_while_anybody_waits_there_are_no_bursts() -> None:
    driver = decoding(5, slots=1)
    driver.submit(1, range(7), 20)
    assert next_repeat(driver) == 1
    driver.absorb()
    driver.core.cancel(1, driver.now)
    assert next_repeat(driver) == 8


def test_while_somebody_is_held_or_resumes_there_are_no_bursts() -> None:
    driver = Driver(4, 1, max_repeat=8)
    for handle in (0, 1):
        driver.submit(handle, range(5), 40)
        driver.plan()
    assert next_repeat(driver) == 1
    assert [len(unpack_u32(driver.plans[-1].hold)), len(driver.rows)] == [1, 1], "one has two tokens in flight"
    for _ in range(3):
        driver.absorb()
    assert next_repeat(driver) == 1
    assert len(unpack_u32(driver.plans[-1].schedule_slots)) == 1, "and resumes"
    assert next_repeat(driver) == 8


@pytest.mark.parametrize(("before", "repeat"), [(DEADLINE_NS - 1, 1), (DEADLINE_NS, 8), (100 * DEADLINE_NS, 8)])
def test_shortly_before_a_deadline_there_are_no_bursts(before: int, repeat: int) -> None:
    driver = decoding(5)
    driver.submit(1, range(7), 50, deadline=driver.now + 3 + before)
    driver.plan()
    driver.absorb()
    assert next_repeat(driver) == repeat


def test_a_burst_reserves_the_blocks_it_needs() -> None:
    driver = decoding(12, 20)
    assert [len(driver.core._sequences[handle].blocks) for handle in (0, 1)] == [1, 2]
    driver.plan()
    assert len(unpack_u32(driver.plans[-1].block_ids)) == 1, "12 + 8 tokens need a second block of 16, 20 + 8 no third"
    assert [sequence.scheduled for sequence in driver.core._running] == [20, 28]


@pytest.mark.parametrize(("blocks", "repeat"), [(3, 1), (4, 8)])
def test_for_a_burst_nobody_gives_way(blocks: int, repeat: int) -> None:
    driver = Driver(max_repeat=8, blocks=blocks, model_tokens=32, step_tokens=100)
    for handle in (0, 1):
        driver.submit(handle, range(12), 18)
    driver.plan()
    driver.absorb()
    assert next_repeat(driver) == repeat
    assert driver.core.load(0, 0, 0).preemptions == 0
    driver.run()
    assert driver.outputs == dict.fromkeys((0, 1), undisturbed(range(12), 18))


def test_a_burst_is_no_longer_than_what_is_left() -> None:
    driver = decoding(5, 9, most=4)
    assert next_repeat(driver) == 3
    driver.absorb()
    assert [driver.finished[handle].reason for handle in (0, 1)] == [Finish.LENGTH] * 2
    assert driver.plan() is None


def test_who_ends_inside_a_burst_has_no_block_behind_its_end_and_the_others_go_on() -> None:
    driver = decoding(5, 9, depth=(2, 1))
    driver.submit(2, range(13), 4)
    driver.plan()
    driver.absorb()
    assert next_repeat(driver) == 8
    ending = driver.core._sequences[2]
    assert (ending.capacity, ending.scheduled, ending.limit) == (16, 21, 17)
    assert len(unpack_u32(driver.plans[-1].block_ids)) == 1, "the second's"
    plan = driver.plan()
    assert plan is not None
    assert len(unpack_u32(plan.release)) == 1, "its last token is in flight: it has left"
    driver.run()
    assert driver.outputs == {
        0: undisturbed(range(5), 100),
        1: undisturbed(range(9), 100),
        2: undisturbed(range(13), 4),
    }
    assert driver.at_rest()


@pytest.mark.parametrize("depth", [(1, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("place", range(1, 18))
def test_who_stops_inside_a_burst_reports_fewer_tokens(depth: tuple[int, int], place: int) -> None:
    whole = undisturbed(range(5), 60)
    driver = Driver(*depth, max_repeat=8)
    driver.submit(1, range(5), 60, stop_ids=[whole[place]])
    driver.submit(2, range(9), 60)
    driver.run()
    assert driver.outputs == {1: whole[: whole.index(whole[place]) + 1], 2: undisturbed(range(9), 60)}
    assert driver.finished[1].reason == Finish.STOP
    assert driver.at_rest()


@pytest.mark.parametrize("depth", [(1, 0), (2, 1)])
def test_cancelled_during_a_burst(depth: tuple[int, int]) -> None:
    driver = decoding(5, 9, 7, depth=depth)
    driver.plan()
    driver.plan()
    driver.core.cancel(1, driver.now)
    driver.check()
    driver.submit(3, range(4), 20)
    driver.run()
    assert driver.finished[1].reason == Finish.CANCELLED
    assert driver.outputs == {
        0: undisturbed(range(5), 100),
        1: undisturbed(range(9), 100)[:1],
        2: undisturbed(range(7), 100),
        3: undisturbed(range(4), 20),
    }


def test_a_sequence_that_gives_way_during_a_burst_waits_for_all_of_its_tokens() -> None:
    driver = Driver(2, 1, blocks=17, model_tokens=256, max_repeat=8, step_tokens=256)
    for handle in (1, 2):
        driver.submit(handle, range(100), 150)
    driver.run()
    assert driver.bursts > 5
    assert driver.core.load(0, 0, 0).preemptions_in_flight > 0
    assert driver.outputs == dict.fromkeys((1, 2), undisturbed(range(100), 150))


def admissions(device: SimulatedDevice, most: tuple[int, ...]) -> StepResult:
    """Prompts of three ids, one a slot, in blocks of their own, whole."""
    slots = list(range(len(most)))
    return device.execute(
        StepPlan(
            1,
            1,
            admissions=tuple(
                Admission(slot, pack_u32([slot, 4, 9]), 3, 3, Sampling(), Stopping(tokens), 0)
                for slot, tokens in zip(slots, most, strict=True)
            ),
            block_slots=pack_u32(slots),
            block_ids=pack_u32(slots),
            schedule_slots=pack_u32(slots),
            schedule_rows=pack_u32([3] * len(slots)),
            rows=pack_u32(slots),
        )
    )


def test_a_burst_is_its_steps_one_after_another() -> None:
    info = Driver().info
    single, burst, most = SimulatedDevice(info), SimulatedDevice(info), (9, 3, 1, 9)
    assert admissions(single, most) == admissions(burst, most)
    by_row: list[list[int]] = [[], [], [], []]
    for number in range(2, 7):
        step = single.execute(StepPlan(1, number))
        tokens = iter(unpack_u32(step.ids))
        for row, count in zip(by_row, step.counts, strict=True):
            row += [next(tokens) for _ in range(count)]
    result = burst.execute(StepPlan(1, 2, repeat=5))
    assert (result.number, list(result.counts)) == (2, [5, 2, 0, 5])
    assert unpack_u32(result.ids).tolist() == [token for row in by_row for token in row]
    assert single.execute(StepPlan(1, 7)) == burst.execute(StepPlan(1, 7)), "the state is the same afterwards"


def test_a_burst_takes_the_time_of_its_steps() -> None:
    executor = SimulatedExecutor()
    info = executor.start(ModelSpec(path="/nonexistent", step_us=5_000), lambda stage, done, total: None)
    start = time.monotonic()
    executor.submit(StepPlan(1, 1, repeat=info.max_repeat))
    while not (results := executor.results()):
        assert time.monotonic() - start < 5
        time.sleep(0.001)
    assert time.monotonic() - start >= 0.04
    assert results[0].device_ns == 40_000_000
    executor.shutdown()
