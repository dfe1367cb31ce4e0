"""What is predicted of steps."""

import pytest

from penstock.scheduler.engine.timing import StepTimes

MS = 1_000_000
SHAPE = StepTimes.shape(64, 0)


def test_nothing_is_predicted_of_a_shape_that_was_not_seen() -> None:
    times = StepTimes()
    times.observe(SHAPE, 10 * MS, 1)
    assert times.predict(StepTimes.shape(64, 100)) == 0
    assert times.predict(StepTimes.shape(100, 0)) == 10 * MS


@pytest.mark.parametrize(("before", "after"), [(10, 100), (100, 10)])
def test_a_device_that_changes_its_pace_is_believed_within_a_few_steps(before: int, after: int) -> None:
    times = StepTimes()
    for _ in range(100):
        times.observe(SHAPE, before * MS, 1)
    for _ in range(12):
        times.observe(SHAPE, after * MS, 1)
    assert abs(times.predict(SHAPE) - after * MS) < 0.5 * after * MS


def test_the_lead_is_a_slow_plan_and_a_margin_and_at_most_one_step() -> None:
    times = StepTimes()
    for host in (*[1 * MS] * 2028, *[4 * MS] * 20):
        times.observe(SHAPE, 10 * MS, host)
    assert times.lead(10 * MS) == 4 * MS + 300_000
    assert times.lead(2 * MS) == 2 * MS


@pytest.mark.parametrize("steps", [4, 16, 64, 128, 192])
@pytest.mark.parametrize("when", [0, 2, 60])
def test_two_interruptions_of_a_young_engine_do_not_make_it_plan_early(steps: int, when: int) -> None:
    times = StepTimes()
    hosts = [1 * MS] * steps
    for index in (0, min(when, steps - 1)):
        hosts[index] = 15 * MS
    for host in hosts:
        times.observe(SHAPE, 20 * MS, host)
    assert times.lead(20 * MS) == 1 * MS + 300_000


def test_the_period_is_a_moving_mean() -> None:
    times = StepTimes()
    for _ in range(100):
        times.observe_period(20 * MS)
    assert times.period_ns == 20 * MS
