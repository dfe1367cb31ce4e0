"""Random arrivals, cancels and preemptions for a while: no block is lost, no token is wrong."""

from __future__ import annotations

import os
import random
import select
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from penstock.executor.step import Sampling, pack_u32, unpack_u32
from penstock.executor.uniproc import UniprocExecutor
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.records.commands import Submit, SubmitSample
from penstock.scheduler.records.events import Finish
from support.by_hand import Kind, no_progress, spec
from support.tiny_llama import TinyLlama, build_tiny_llama

SECONDS = float(os.environ.get("PENSTOCK_SOAK_SECONDS", "4"))
"""Four minutes on a GPU is what a release is held to: PENSTOCK_SOAK_SECONDS=240."""
CHECKED = 40
"""Sequences that are computed once more, alone."""


@dataclass
class Sent:
    """A request, and what came of it."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    ids: list[int] = field(default_factory=list)
    reason: int | None = None


class Soak:
    """A core, an executor and a source of trouble."""

    def __init__(self, folder: Path, kind: Kind, **changes: int) -> None:
        self.executor = UniprocExecutor()
        self.info = self.executor.start(spec(folder, 2, **(kind | changes)), no_progress)
        self.core = Core(self.info, FirstComeFirstServed())
        self.random = random.Random(11)
        self.sent: dict[int, Sent] = {}
        self.preemptions = 0

    def submit(self, sent: Sent) -> None:
        handle = len(self.sent) + 1
        self.sent[handle] = sent
        sample = SubmitSample(handle, 0, sent.seed)
        ids = pack_u32(sent.prompt)
        self.core.submit(Submit((sample,), ids, sent.sampling, sent.max_tokens, time.monotonic_ns(), ignore_eos=True))

    def draw(self) -> Sent:
        source = self.random
        temperature = source.choice((0.0, 0.8, 1.3))
        sampling = Sampling(temperature, source.choice((1.0, 0.9)), source.choice((0, 20)))
        prompt = [source.randrange(3, 300) for _ in range(source.choice((1, 5, 8, 17, 40, 120)))]
        return Sent(prompt, source.choice((1, 3, 20, 60)), sampling, source.getrandbits(64))

    def disturb(self) -> None:
        """Arrivals in bursts, a cancel now and then."""
        if self.random.random() < 0.2:
            for _ in range(self.random.choice((1, 1, 5))):
                self.submit(self.draw())
        if self.sent and self.random.random() < 0.05:
            self.core.cancel(self.random.randrange(1, len(self.sent) + 1), time.monotonic_ns())

    def turn(self) -> None:
        """Plan as far ahead as may be, then take in one result."""
        core = self.core
        while core.has_work and core.in_flight < self.info.plans_in_flight:
            plan = core.plan(time.monotonic_ns())
            if plan is None:
                break
            self.executor.submit(plan)
        if core.in_flight:
            assert select.select([self.executor.fileno()], [], [], 60)[0], "no result within a minute"
            for result in self.executor.results():
                core.absorb(result, time.monotonic_ns())
        self.take()

    def take(self) -> None:
        step = self.core.take_output()
        if step is None:
            return
        ids = iter(unpack_u32(step.ids))
        for handle, count in zip(unpack_u32(step.handles), step.counts, strict=True):
            self.sent[handle].ids += [next(ids) for _ in range(count)]
        for finished in step.finished:
            self.sent[finished.handle].reason = finished.reason
            self.preemptions += finished.preemptions

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if len(self.sent) - sum(sent.reason is not None for sent in list(self.sent.values())[-200:]) < 10_000:
                self.disturb()
            self.turn()
        self.finish()

    def finish(self) -> None:
        while self.core.has_work or self.core.in_flight:
            self.turn()


@pytest.mark.timeout(SECONDS + 300)
def test_every_block_is_free_and_every_token_right_after_a_soak(
    tmp_path_factory: pytest.TempPathFactory, kind: Kind
) -> None:
    folder = build_tiny_llama(tmp_path_factory.mktemp("soak"), seed=4, shape=TinyLlama(eos_token_id=None))
    soak = Soak(folder, kind, num_blocks=66, max_sequences=12, max_step_tokens=40)
    try:
        soak.run(SECONDS)
        load = soak.core.load(time.monotonic_ns(), 0, 0)
        assert (load.free_blocks, load.running, load.waiting) == (load.total_blocks, 0, 0)
        ended = [sent for sent in soak.sent.values() if sent.reason == Finish.LENGTH]
        assert {sent.reason for sent in soak.sent.values()} == {Finish.LENGTH, Finish.CANCELLED}
        assert soak.preemptions > 3, "the pool is small enough for that"
        first = len(soak.sent)
        again = soak.random.sample(ended, min(CHECKED, len(ended)))
        for sent in again:
            soak.submit(Sent(sent.prompt, sent.max_tokens, sent.sampling, sent.seed))
            soak.finish()
        assert [sent.ids for sent in again] == [soak.sent[first + 1 + i].ids for i in range(len(again))]
    finally:
        soak.executor.shutdown()
