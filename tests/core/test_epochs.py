"""The device is lost: what was on it is computed again, what was told stays."""

import pytest

from penstock.executor.step import StepResult, unpack_u32
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.core.sequence import State
from penstock.scheduler.records.events import Finish, Span
from support.core_driver import Driver, undisturbed


def test_a_new_epoch_counts_from_one_and_admits_everyone_anew_with_what_is_known() -> None:
    driver = Driver(2, 1, step_tokens=100)
    driver.submit(1, range(5), 20)
    driver.submit(2, range(9), 20)
    for _ in range(3):
        driver.plan()
        driver.absorb()
    driver.plan()
    driver.lose_epoch()
    plan = driver.plan()
    assert plan is not None
    assert (plan.epoch, plan.number, plan.release) == (2, 1, b"")
    assert [(a.total_ids, a.prompt_ids) for a in plan.admissions] == [(8, 5), (12, 9)]
    assert plan.rows is not None
    assert len(unpack_u32(plan.block_ids)) == 2
    driver.run()
    assert driver.outputs == {1: undisturbed(range(5), 20), 2: undisturbed(range(9), 20)}
    assert {finished.preemptions for finished in driver.finished.values()} == {1}
    assert driver.at_rest()


def test_everything_is_free_and_nobody_runs_after_a_loss() -> None:
    driver = Driver(2, 1)
    for handle in range(5):
        driver.submit(handle, range(30), 20)
    driver.plan()
    driver.plan()
    driver.lose_epoch()
    load = driver.core.load(driver.now, 0, 0)
    assert (load.running, load.waiting, load.free_blocks) == (0, 5, load.total_blocks)
    assert load.waiting_tokens == 150
    for sequence in driver.core._sequences.values():
        assert sequence.state is State.WAITING
        assert (sequence.ahead, sequence.sampled_by, sequence.in_flight, sequence.scheduled) == (0, 0, 0, 0)
    assert driver.core.last_flight is None


def test_who_ran_comes_before_who_waits_in_order_of_arrival() -> None:
    driver = Driver(1, 0, slots=2, step_tokens=100)
    for handle in range(5):
        driver.submit(handle, range(4 + handle), 20)
    driver.plan()
    driver.absorb()
    driver.lose_epoch()
    plan = driver.plan()
    assert plan is not None
    assert [admission.prompt_ids for admission in plan.admissions] == [4, 5]
    driver.run()
    starts = [driver.finished[handle].started_ns for handle in range(5)]
    assert starts == sorted(starts)


def test_who_had_left_with_its_last_token_in_flight_is_computed_again() -> None:
    driver = Driver(3, 2, slots=1)
    driver.submit(1, range(5), 2)
    driver.submit(2, range(6), 2)
    for _ in range(3):
        driver.plan()
    first = driver.core._sequences[1]
    assert (first.slot, first.state, first.in_flight) == (-1, State.RUNNING, 2)
    driver.lose_epoch()
    assert first.state is State.WAITING
    driver.run()
    assert driver.outputs == {1: undisturbed(range(5), 2), 2: undisturbed(range(6), 2)}
    assert driver.at_rest()


def test_a_preempted_one_whose_tokens_are_lost_waits_for_them_no_more() -> None:
    driver = Driver(2, 1, blocks=17, model_tokens=256)
    driver.submit(1, range(100), 150)
    driver.submit(2, range(100), 150)
    while not driver.core.load(0, 0, 0).preemptions_in_flight:
        if len(driver.answers) == 2:
            driver.absorb()
        driver.plan()
    second = driver.core._sequences[2]
    assert second.state is State.WAITING
    assert second.in_flight
    driver.lose_epoch()
    assert not second.in_flight
    driver.run()
    assert driver.outputs == dict.fromkeys((1, 2), undisturbed(range(100), 150))


def test_the_ended_stay_ended() -> None:
    driver = Driver(2, 1)
    driver.submit(1, range(5), 1)
    driver.submit(2, range(5), 50)
    driver.plan()
    driver.absorb()
    driver.plan()
    driver.core.cancel(2, driver.now)
    driver.lose_epoch()
    assert {handle: its.reason for handle, its in driver.finished.items()} == {1: Finish.LENGTH, 2: Finish.CANCELLED}
    assert driver.plan() is None
    assert not driver.core.has_work
    assert driver.at_rest()


def test_a_deadline_still_ends_who_is_to_be_computed_again() -> None:
    driver = Driver()
    driver.submit(1, range(5), 50, deadline=1000)
    driver.plan()
    driver.lose_epoch()
    driver.core.expire(1000)
    driver.drain()
    assert driver.finished[1].reason == Finish.DEADLINE
    assert driver.at_rest()


def test_nothing_to_lose() -> None:
    driver = Driver()
    driver.lose_epoch()
    driver.submit(1, range(5), 5)
    driver.lose_epoch()
    driver.run()
    assert {plan.epoch for plan in driver.plans} == {3}
    assert driver.finished[1].preemptions == 0, "it had not started"


def test_a_result_of_an_older_epoch_changes_nothing_and_one_of_a_later_is_refused() -> None:
    driver = Driver()
    driver.submit(1, range(5), 20)
    driver.plan()
    late = driver.answers[0]
    driver.lose_epoch()
    driver.plan()
    assert driver.core.absorb(late, driver.now) is None
    driver.check()
    assert (driver.outputs[1], driver.core.in_flight) == ([], 1)
    with pytest.raises(ValueError, match=r"3\.1 answers no plan"):
        driver.core.absorb(StepResult(3, 1, b"\1", b"\0" * 4), driver.now)
    driver.run()
    assert driver.outputs[1] == undisturbed(range(5), 20)


def test_a_loss_during_a_burst() -> None:
    driver = Driver(2, 1, max_repeat=8)
    driver.submit(1, range(5), 60)
    driver.submit(2, range(9), 5)
    driver.plan()
    driver.absorb()
    driver.plan()
    driver.plan()
    assert driver.bursts == 2
    driver.lose_epoch()
    driver.run()
    assert driver.outputs == {1: undisturbed(range(5), 60), 2: undisturbed(range(9), 5)}
    assert driver.at_rest()


def test_a_loss_is_told_in_the_trace() -> None:
    driver = Driver()
    driver.submit(1, range(5), 20)
    driver.plan()
    driver.absorb()
    driver.plan()
    driver.absorb()
    driver.lose_epoch()
    driver.run()
    kinds = [Span(span.kind) for span in driver.spans]
    again = [Span.QUEUED, Span.PREFILL, Span.DECODE]
    assert kinds == [Span.QUEUED, Span.PREFILL, Span.FIRST_TOKEN, Span.DECODE, Span.PREEMPTED, *again]
    assert [(span.number, span.cause) for span in driver.spans if span.kind == Span.PREEMPTED] == [(6, "epoch")]


def test_the_first_epoch_may_be_any() -> None:
    driver = Driver()
    driver.core = Core(driver.info, FirstComeFirstServed(), epoch=7)
    driver.submit(1, range(5), 5)
    driver.plan()
    driver.lose_epoch()
    driver.run()
    assert [driver.plans[0].epoch, driver.plans[-1].epoch] == [7, 8]
