"""A plan carries differences: its size follows what changes, not what there is."""

import random
import statistics

import pytest

from penstock.executor.step import encode_plan
from support.core_driver import Driver

SEQUENCES = 256
STEPS = 500


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("depth", [(1, 0), (2, 1)])
def test_a_steady_batch_of_256_takes_less_than_200_bytes_a_step(depth: tuple[int, int], block_tokens: int) -> None:
    """Unaligned lengths, so that in every step some sequences cross the border of a block."""
    rng = random.Random(0)
    driver = Driver(
        *depth,
        slots=SEQUENCES,
        step_tokens=4096,
        model_tokens=1024,
        block_tokens=block_tokens,
        blocks=SEQUENCES * 1024 // block_tokens,
    )
    for handle in range(SEQUENCES):
        driver.submit(handle, [rng.randrange(900) for _ in range(rng.randint(20, 300))], 700)
    core, sizes, borders = driver.core, list[int](), 0
    while len(sizes) < STEPS:
        plan = core.plan(driver.now)
        assert plan is not None
        if plan.rows is None:
            sizes.append(len(encode_plan(plan)))
            borders += len(plan.block_ids) // 4
        driver.answers.append(driver.device.execute(plan))
        if len(driver.answers) == depth[0]:
            core.absorb(driver.answers.popleft(), driver.now)
        core.take_output()
    assert len(core._running) == SEQUENCES
    assert borders >= STEPS * SEQUENCES // block_tokens - SEQUENCES
    assert statistics.median(sizes) < 200
    assert max(sizes) < 400
