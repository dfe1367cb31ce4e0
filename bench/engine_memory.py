"""What the engine's core holds per live token, and what is left after a million tokens, and after a second million.

256 sequences grow to 4,096 tokens each (a million in all), on a device that answers at once and keeps nothing; what
Python has allocated is counted by tracemalloc. ``python bench/engine_memory.py``
"""

import gc
import time
import tracemalloc

from penstock.executor.step import ModelInfo, Sampling, StepResult, pack_u32
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.records.commands import Submit, SubmitSample
from record import save

_SEQUENCES = 256
_TOKENS = 4096
_PROMPT = 16


def _info() -> ModelInfo:
    return ModelInfo(
        model_digest="",
        vocab_size=32_000,
        eos_ids=(),
        max_model_tokens=_TOKENS,
        max_sequences=_SEQUENCES,
        max_step_tokens=8192,
        block_tokens=64,
        num_blocks=_SEQUENCES * _TOKENS // 64,
        plans_in_flight=1,
        tokens_ahead=0,
    )


def _step(core: Core, number: int) -> None:
    plan = core.plan(number)
    assert plan is not None
    flight = core.last_flight
    assert flight is not None
    rows = len(flight.members)
    core.absorb(StepResult(1, flight.number, b"\1" * rows, pack_u32([number % 32_000] * rows)), number)
    core.take_output()


def main() -> None:
    """Measure, print and save."""
    core = Core(_info(), FirstComeFirstServed())
    gc.collect()
    tracemalloc.start()
    empty, _ = tracemalloc.get_traced_memory()
    live, full, after = _million(core)
    _, _, later = _million(core)
    figures = {
        "bar": "≤ 8 bytes a live token, nothing left",
        "live_tokens": live,
        "bytes_per_live_token": (full - empty) / live,
        "bytes_left_by_the_first_million": after - empty,
        "bytes_left_by_the_second_million": later - after,
        "what_is_left": "room in the free list and in dictionaries, kept for the next sequences",
    }
    print(figures)
    save("engine_memory", figures)


def _million(core: Core) -> tuple[int, int, int]:
    """Grow all sequences and let them end: live tokens at the peak, bytes allocated then, bytes allocated after."""
    for handle in range(_SEQUENCES):
        sample = SubmitSample(handle, 0, 1)
        core.submit(Submit((sample,), pack_u32([1] * _PROMPT), Sampling(), _TOKENS - _PROMPT, time.monotonic_ns()))
    number = 0
    while core.load(0, 0, 0).running < _SEQUENCES or number < _TOKENS - _PROMPT - 1:
        number += 1
        _step(core, number)
    gc.collect()
    full, _ = tracemalloc.get_traced_memory()
    live = _SEQUENCES * (_PROMPT + number)
    while core.has_work:
        number += 1
        _step(core, number)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    return live, full, after


if __name__ == "__main__":
    main()
