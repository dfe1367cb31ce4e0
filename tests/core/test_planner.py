"""What a plan carries, case by case."""

import msgspec
import pytest

from penstock.executor.step import FRAGMENT_TOKENS, SlotFailure, StepResult, unpack_u32
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.records.events import Finish, Span
from support.core_driver import Driver, undisturbed


def test_decodes_come_first_and_prompts_fill_the_rest_in_chunks() -> None:
    driver = Driver(step_tokens=10)
    driver.submit(1, range(4), 20)
    driver.plan()
    driver.absorb()
    driver.submit(2, range(30), 20)
    plan = driver.plan()
    assert plan is not None
    assert (unpack_u32(plan.schedule_rows).tolist(), len(unpack_u32(plan.rows or b""))) == ([9], 2)


def test_a_steady_batch_sends_nothing_but_blocks() -> None:
    driver = Driver()
    for handle in range(4):
        driver.submit(handle, range(5), 100)
    driver.plan()
    driver.absorb()
    driver.plan()
    driver.absorb()
    plan = driver.plan()
    assert plan is not None
    assert (plan.rows, plan.admissions, plan.hold, plan.release, plan.schedule_slots) == (None, (), b"", b"", b"")


def test_rows_are_ordered_longest_first() -> None:
    driver = Driver(step_tokens=100)
    for handle, length in enumerate((5, 30, 12)):
        driver.submit(handle, range(length), 9)
    plan = driver.plan()
    assert plan is not None
    by_slot = {admission.slot: admission.total_ids for admission in plan.admissions}
    assert [by_slot[slot] for slot in unpack_u32(plan.rows or b"")] == [30, 12, 5]


def test_a_sequence_whose_last_token_is_in_flight_leaves_at_once() -> None:
    driver = Driver(2, 1, slots=1)
    driver.submit(1, range(5), 2)
    driver.submit(2, range(6), 2)
    driver.plan()
    driver.plan()
    assert not driver.finished
    driver.absorb()
    plan = driver.plan()
    assert plan is not None
    assert [unpack_u32(plan.release).tolist(), [a.slot for a in plan.admissions]] == [[0], [0]]
    driver.run()
    assert driver.outputs == {1: undisturbed(range(5), 2), 2: undisturbed(range(6), 2)}


def test_without_tokens_ahead_a_sequence_sits_out_until_its_token_is_known() -> None:
    driver = Driver(4, 0)
    driver.submit(1, range(5), 3)
    driver.submit(2, range(5), 3)
    driver.plan()
    assert driver.plan() is None
    driver.absorb()
    assert driver.plan() is not None
    driver.run()
    assert driver.outputs[1] == undisturbed(range(5), 3)


def test_chunks_of_one_prompt_are_in_flight_behind_one_another() -> None:
    driver = Driver(4, 0, step_tokens=10)
    driver.submit(1, range(35), 3)
    assert [driver.plan() is not None for _ in range(4)] == [True] * 4
    driver.run()
    assert driver.outputs[1] == undisturbed(range(35), 3)


def test_a_preempted_sequence_keeps_its_tokens_in_flight_and_waits_for_them() -> None:
    driver = Driver(2, 1, blocks=17, model_tokens=256)
    driver.submit(1, range(100), 150)
    driver.submit(2, range(100), 150)
    driver.run()
    load = driver.core.load(0, 0, 0)
    assert load.preemptions > 0
    assert load.preemptions_in_flight > 0
    assert driver.outputs == {1: undisturbed(range(100), 150), 2: undisturbed(range(100), 150)}
    assert driver.finished[1].preemptions == 0, "the first to arrive never gives way"
    preempted = [span for span in driver.spans if span.kind == Span.PREEMPTED]
    assert {span.cause for span in preempted} == {"blocks"}


def test_a_long_prompt_travels_in_fragments() -> None:
    length = FRAGMENT_TOKENS * 2 + 100
    driver = Driver(blocks=2500, step_tokens=20_000, model_tokens=40_000)
    driver.submit(1, [i % 900 for i in range(length)], 4)
    driver.run()
    assert max(len(a.ids) for plan in driver.plans for a in plan.admissions) == 4 * FRAGMENT_TOKENS
    assert [f.index for plan in driver.plans for f in plan.fragments] == [1, 2]
    assert driver.outputs[1] == undisturbed([i % 900 for i in range(length)], 4)


def test_a_deadline_that_passes_in_the_queue_costs_no_work() -> None:
    driver = Driver(slots=1)
    driver.submit(1, range(5), 200)
    driver.plan()
    driver.submit(2, range(5), 10, deadline=driver.now + 5)
    driver.core.expire(driver.now + 5)
    driver.run()
    assert driver.finished[2].reason == Finish.DEADLINE
    assert driver.finished[2].started_ns == 0
    assert sum(len(plan.admissions) for plan in driver.plans) == 1


def test_cancelled_with_tokens_in_flight() -> None:
    driver = Driver(2, 1)
    driver.submit(1, range(5), 200)
    driver.plan()
    driver.plan()
    driver.core.cancel(1, driver.now)
    driver.core.cancel(99, driver.now)
    driver.check()
    assert driver.finished[1].reason == Finish.CANCELLED
    driver.submit(2, range(8), 10)
    driver.run()
    assert driver.outputs == {1: [], 2: undisturbed(range(8), 10)}
    assert driver.at_rest()


def test_what_was_delivered_is_continued() -> None:
    whole = undisturbed(range(9), 30)
    driver = Driver()
    driver.submit(1, range(9), 30, delivered=whole[:11])
    driver.run()
    assert driver.outputs[1] == whole
    assert driver.finished[1].tokens == 30


def test_a_failed_slot_ends_its_sequence_alone() -> None:
    driver = Driver(2, 1)
    driver.submit(1, range(5), 20)
    driver.submit(2, range(7), 20)
    plan = driver.plan()
    assert plan is not None
    slot = next(a.slot for a in plan.admissions if a.total_ids == 5)
    result = driver.answers.popleft()
    silent = bytes(0 if its == slot else 1 for its in unpack_u32(plan.rows or b""))
    other = unpack_u32(result.ids)[silent.index(1)]
    driver.answers.append(
        StepResult(1, 1, silent, int(other).to_bytes(4, "little"), failed=(SlotFailure(slot, "NaN in the logits"),))
    )
    driver.absorb()
    driver.run()
    assert (driver.finished[1].reason, driver.finished[1].detail) == (Finish.FAILED, "NaN in the logits")
    assert driver.outputs[2] == undisturbed(range(7), 20)


def test_results_that_answer_nothing_are_refused() -> None:
    driver = Driver()
    driver.submit(1, range(5), 20)
    driver.plan()
    for wrong in (StepResult(1, 2, b"\1", b"\0" * 4), StepResult(2, 1, b"\1", b"\0" * 4), StepResult(1, 1, b"", b"")):
        with pytest.raises(ValueError, match="result"):
            driver.core.absorb(wrong, 5)


def test_a_pool_that_holds_no_whole_sequence_is_refused() -> None:
    info = msgspec.structs.replace(Driver(blocks=15).info, max_model_tokens=241)
    with pytest.raises(ValueError, match="hold no sequence"):
        Core(info, FirstComeFirstServed())


def test_a_traced_sequence_tells_its_life() -> None:
    driver = Driver(step_tokens=10)
    driver.submit(1, range(25), 5)
    driver.run()
    kinds = [Span(span.kind) for span in driver.spans]
    assert kinds == [Span.QUEUED, Span.PREFILL, Span.PREFILL, Span.FIRST_TOKEN, Span.PREFILL, Span.DECODE] or kinds == [
        Span.QUEUED, Span.PREFILL, Span.PREFILL, Span.FIRST_TOKEN, Span.DECODE, Span.PREFILL,
    ]  # fmt: skip
    assert [span.number for span in driver.spans if span.kind == Span.PREFILL] == [10, 10, 5]
