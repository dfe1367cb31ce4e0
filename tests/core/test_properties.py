"""Whatever happens, in whatever order: every request ends as if it were alone, and nothing is lost."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.core.sequence import Sequence
from penstock.scheduler.records.events import Finish
from support.core_driver import VOCAB, Driver, random_prompt, undisturbed

DEPTHS = [(1, 0), (2, 1), (4, 0), (3, 2)]


def drive(
    rng: random.Random,
    depth: tuple[int, int],
    steps: int,
    *,
    blocks: int,
    cancels: float,
    arrivals: float = 0.2,
    repeat: int = 1,
    losses: float = 0.0,
) -> Driver:
    """Random arrivals, cancels, deadlines, delays and lost devices for that many steps, then the end."""
    slots, rows = rng.choice([1, 8, 16, 16]), rng.randint(16, 64)
    driver = Driver(*depth, blocks=blocks, slots=slots, step_tokens=rows, max_repeat=repeat, tick_ns=100_000)
    expected: dict[int, list[int]] = {}
    disturbed: set[int] = set()
    handle = 0
    for _ in range(steps):
        if rng.random() < arrivals:
            handle += 1
            prompt, most = random_prompt(rng, 120), rng.randint(1, 100)
            least, stops = rng.randint(0, most), [rng.randrange(VOCAB) for _ in range(rng.randint(0, 30))]
            deadline = driver.now + rng.randint(0, 400) * driver.tick_ns if rng.random() < cancels else 0
            disturbed.update([handle] if deadline else [])
            expected[handle] = undisturbed(prompt, most, least, stops)
            driver.submit(handle, prompt, most, least, stops, deadline=deadline)
        if handle and rng.random() < cancels:
            victim = rng.randint(1, handle)
            disturbed.add(victim)
            driver.core.cancel(victim, driver.now)
        driver.core.expire(driver.now)
        if rng.random() < losses:
            driver.lose_epoch()
        if len(driver.answers) < depth[0]:
            driver.plan()
        if driver.answers and (len(driver.answers) == depth[0] or rng.random() < 0.5):
            driver.absorb()
    driver.run()
    assert driver.at_rest()
    assert driver.finished.keys() == expected.keys()
    for handle, output in expected.items():
        got = driver.outputs[handle]
        assert got == output[: len(got)]
        if handle not in disturbed:
            assert got == output
            assert driver.finished[handle].reason in (Finish.STOP, Finish.LENGTH)
    return driver


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("blocks", [16, 24, 200])
def test_two_thousand_steps(depth: tuple[int, int], blocks: int) -> None:
    driver = drive(random.Random(f"{depth}{blocks}"), depth, 2000, blocks=blocks, cancels=0.05)
    assert len(driver.finished) > 300


@pytest.mark.long
@pytest.mark.parametrize("depth", DEPTHS)
def test_twenty_thousand_steps(depth: tuple[int, int]) -> None:
    drive(random.Random(str(depth)), depth, 20_000, blocks=20, cancels=0.05)


@pytest.mark.long
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("repeat", [2, 8])
def test_a_hundred_thousand_steps_with_losses(depth: tuple[int, int], repeat: int) -> None:
    rng = random.Random(f"{depth}{repeat} long")
    driver = drive(rng, depth, 100_000, blocks=40, cancels=0.02, arrivals=0.05, repeat=repeat, losses=0.01)
    assert driver.bursts > 0
    assert len({plan.epoch for plan in driver.plans}) > 300


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(DEPTHS), st.integers(16, 60), st.sampled_from([0.0, 0.3]))
def test_any_script(rng: random.Random, depth: tuple[int, int], blocks: int, cancels: float) -> None:
    drive(rng, depth, 60, blocks=blocks, cancels=cancels)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("repeat", [1, 3, 8])
def test_lost_epochs_and_bursts(depth: tuple[int, int], repeat: int) -> None:
    rng = random.Random(f"{depth}{repeat}")
    driver = drive(rng, depth, 2000, blocks=40, cancels=0.02, arrivals=0.05, repeat=repeat, losses=0.01)
    assert len(driver.finished) > 60
    assert len({plan.epoch for plan in driver.plans}) > 8
    assert any(span.cause == "epoch" for span in driver.spans)
    assert (driver.bursts > 0) is (repeat > 1)


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(DEPTHS), st.integers(16, 60), st.integers(1, 8))
def test_any_script_with_losses(rng: random.Random, depth: tuple[int, int], blocks: int, repeat: int) -> None:
    arrivals = rng.choice([0.05, 0.2])
    drive(rng, depth, 60, blocks=blocks, cancels=0.1, arrivals=arrivals, repeat=repeat, losses=0.05)


class Capricious(FirstComeFirstServed):
    """Anyone may give way, also one that the plan has something for already."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.random = rng

    def victim(self, running: Iterable[Sequence], needy: Sequence) -> Sequence:
        return self.random.choice(list(running))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("step_tokens", [3, 7, 40])
def test_whoever_gives_way_and_however_few_rows_there_are(depth: tuple[int, int], step_tokens: int) -> None:
    rng = random.Random(f"{depth}{step_tokens}")
    driver = Driver(*depth, blocks=10, slots=10, step_tokens=step_tokens, model_tokens=160, policy=Capricious(rng))
    prompts = [random_prompt(rng, 20) for _ in range(30)]
    for handle, prompt in enumerate(prompts):
        driver.submit(handle, prompt, 60)
    driver.run()
    for handle, prompt in enumerate(prompts):
        assert driver.outputs[handle] == undisturbed(prompt, 60)
    assert driver.core.load(0, 0, 0).preemptions > 5
    assert driver.at_rest()
