"""What a plan carries, case by case."""

import msgspec
import pytest

from penstock.executor.step import FRAGMENT_TOKENS, Sampling, SlotFailure, StepResult, pack_u32, unpack_u32
from penstock.scheduler.core.plan_builder import PlanBuilder
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.records.commands import Submit, SubmitSample
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
    assert kinds == [Span.QUEUED, Span.PREFILL, Span.PREFILL, Span.PREFILL, Span.FIRST_TOKEN, Span.DECODE]
    assert [span.number for span in driver.spans if span.kind == Span.PREFILL] == [10, 10, 5]


@pytest.mark.parametrize("length", [FRAGMENT_TOKENS, FRAGMENT_TOKENS + 1, FRAGMENT_TOKENS * 2 + 1])
def test_one_id_behind_a_whole_fragment_is_sent_before_it_is_computed(length: int) -> None:
    prompt = [i % 900 for i in range(length)]
    driver = Driver(blocks=2500, step_tokens=FRAGMENT_TOKENS, model_tokens=40_000)
    driver.submit(1, prompt, 3)
    driver.run()
    assert driver.outputs[1] == undisturbed(prompt, 3)


def request(prompt: bytes, max_tokens: int = 5, stop_ids: bytes = b"", handle: int = 1) -> Submit:
    return Submit((SubmitSample(handle, 0, 7),), prompt, Sampling(), max_tokens, 1, stop_ids=stop_ids)


@pytest.mark.parametrize(
    "refused",
    [
        request(b""),
        request(b"abc"),
        request(bytes(4 * 256)),
        request(bytes(4 * 9), 0),
        request(bytes(4 * 9), stop_ids=pack_u32(list(range(65)))),
        request(bytes(4 * 9), stop_ids=b"abc"),
        request(bytes(4 * 9), handle=9),
    ],
    ids=["no prompt", "no column", "too long", "no output", "stop ids", "no column of stop ids", "taken handle"],
)
def test_what_can_never_run_is_not_taken_and_disturbs_nobody(refused: Submit) -> None:
    driver = Driver()
    driver.submit(9, range(5), 20)
    driver.plan()
    with pytest.raises(ValueError, match=r"fit|stop ids|length|taken"):
        driver.core.submit(refused)
    driver.outputs[1] = []
    driver.core.refuse(refused, "no", driver.now)
    driver.run()
    assert driver.outputs[9] == undisturbed(range(5), 20)
    assert driver.at_rest()
    if refused.samples[0].handle == 1:
        assert (driver.finished[1].reason, driver.finished[1].detail) == (Finish.FAILED, "no")


@pytest.mark.parametrize("depth", [(1, 0), (2, 1), (4, 0)])
def test_core_and_device_agree_where_the_model_ends(depth: tuple[int, int]) -> None:
    driver = Driver(*depth, model_tokens=64)
    driver.submit(1, range(20), 1000)
    driver.run()
    assert driver.outputs[1] == undisturbed(range(20), 44)
    assert driver.finished[1].reason == Finish.LENGTH
    assert driver.plans[0].admissions[0].stopping.max_tokens == 44, "any device ends it there by itself"


def test_what_was_delivered_whole_ends_without_work() -> None:
    whole = undisturbed(range(9), 30)
    driver = Driver()
    driver.submit(1, range(9), 30, delivered=whole)
    driver.submit(2, range(9), 40, stop_ids=[whole[10]], delivered=whole[:11])
    assert driver.plan() is None
    assert [driver.finished[handle].reason for handle in (1, 2)] == [Finish.LENGTH, Finish.STOP]
    assert driver.at_rest()


def test_deadlines_of_the_ended_are_forgotten() -> None:
    driver = Driver()
    for handle in range(1000):
        driver.submit(handle, range(5), 2, deadline=10**12)
        driver.core.cancel(handle, driver.now)
    assert len(driver.core._deadlines) < 100


def test_a_deadline_ends_who_runs_and_spares_a_handle_that_is_used_again() -> None:
    driver = Driver(2, 1)
    driver.submit(1, range(5), 200, deadline=100)
    driver.submit(2, range(5), 20, deadline=200)
    driver.plan()
    driver.plan()
    driver.core.cancel(2, driver.now)
    driver.drain()
    assert driver.finished.pop(2).reason == Finish.CANCELLED
    driver.core.expire(100)
    driver.drain()
    assert driver.finished[1].reason == Finish.DEADLINE
    driver.submit(2, range(7), 20)
    driver.core.expire(300)
    driver.run()
    assert driver.outputs[2] == undisturbed(range(7), 20)


def test_chunks_go_on_beside_decodes_and_decodes_are_never_kept_waiting() -> None:
    driver = Driver(step_tokens=8, slots=4)
    for handle in range(3):
        driver.submit(handle, range(2), 60)
    driver.plan()
    driver.absorb()
    driver.submit(9, range(100), 5)
    for step in range(1, 20):
        driver.plan()
        driver.absorb()
        assert [len(driver.outputs[handle]) for handle in range(3)] == [step + 1] * 3
    assert driver.core._sequences[9].scheduled == 95


def test_who_is_first_in_the_queue_is_not_overtaken() -> None:
    driver = Driver(blocks=16, model_tokens=256)
    driver.submit(1, range(100), 30)
    driver.submit(2, range(200), 2)
    driver.submit(3, range(5), 2)
    driver.run()
    started = [driver.finished[handle].started_ns for handle in (1, 2, 3)]
    assert started[0] < started[1] <= started[2]
    assert driver.finished[1].finished_ns < started[1], "the third would fit beside the first, and waits its turn"


def test_a_result_whose_columns_differ_is_refused() -> None:
    driver = Driver()
    driver.submit(1, range(5), 20)
    driver.plan()
    with pytest.raises(ValueError, match="4 bytes of 2 ids"):
        driver.core.absorb(StepResult(1, 1, b"\2", b"\0" * 4), 5)


def test_more_who_decode_than_rows_take_turns() -> None:
    driver = Driver(4, 0, step_tokens=4, slots=8)
    for handle in range(8):
        driver.submit(handle, [handle], 12)
    driver.plan()
    driver.plan()
    driver.absorb()
    driver.absorb()
    plan = driver.plan()
    assert plan is not None
    assert (len(driver.rows), len(unpack_u32(plan.hold))) == (4, 4)
    driver.run()
    assert driver.outputs == {handle: undisturbed([handle], 12) for handle in range(8)}


def test_the_model_s_own_end_counts_unless_it_is_to_be_ignored() -> None:
    whole = undisturbed(range(9), 30)
    driver = Driver(2, 1, eos_ids=(whole[6],))
    driver.submit(1, range(9), 30)
    driver.core.submit(msgspec.structs.replace(request(pack_u32(list(range(9))), 30, handle=2), ignore_eos=True))
    driver.outputs[2] = []
    driver.run()
    assert driver.outputs == {1: whole[:7], 2: whole}
    assert [driver.finished[handle].reason for handle in (1, 2)] == [Finish.STOP, Finish.LENGTH]


def test_an_admission_says_how_each_sample_is_drawn() -> None:
    driver = Driver()
    samples = (SubmitSample(1, 0, 5), SubmitSample(2, 1, 2**64 - 1, pack_u32([3, 4])))
    sampling = Sampling(temperature=0.5, top_k=3)
    driver.core.submit(Submit(samples, pack_u32([1, 2]), sampling, 9, 1))
    plan = driver.plan()
    assert plan is not None
    assert [(a.seed, a.sample_index, a.prompt_ids, a.total_ids, a.sampling) for a in plan.admissions] == [
        (5, 0, 2, 2, sampling),
        (2**64 - 1, 1, 2, 4, sampling),
    ]


def test_who_gives_way_gives_its_row_back() -> None:
    driver = Driver()
    driver.submit(1, range(5), 20)
    driver.plan()
    builder = PlanBuilder(4)
    victim = driver.core._sequences[1]
    builder.decodes.append(victim)
    builder.rows_left -= 1
    builder.forget(victim)
    assert (builder.decodes, builder.rows_left) == ([], 4)
