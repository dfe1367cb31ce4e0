"""Drives a core over a simulated device, step by step, with plans in flight, and checks its books after each."""

import random
from array import array
from collections import deque
from collections.abc import Sequence as Ids

import msgspec

from penstock.executor.simulated import SimulatedDevice, answer, describe
from penstock.executor.step import (
    ModelSpec,
    Sampling,
    StepPlan,
    StepResult,
    decode_plan,
    encode_plan,
    pack_u32,
    unpack_u32,
)
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies import Policy
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.core.sequence import State
from penstock.scheduler.records.commands import Submit, SubmitSample
from penstock.scheduler.records.events import Finished, SpanEvent

VOCAB = 997


def undisturbed(prompt: Ids[int], max_tokens: int, min_tokens: int = 0, stop_ids: Ids[int] = ()) -> list[int]:
    """What the simulated model makes of a prompt that is alone."""
    ids, output = list(prompt), list[int]()
    while True:
        token = answer(ids, VOCAB, stop_ids if len(output) < min_tokens else ())
        ids.append(token)
        output.append(token)
        if token in stop_ids or len(output) == max_tokens:
            return output


class Driver:
    """A core and a device; ``outputs`` and ``finished`` by handle."""

    def __init__(
        self,
        plans_in_flight: int = 1,
        tokens_ahead: int = 0,
        *,
        blocks: int = 40,
        block_tokens: int = 16,
        slots: int = 16,
        step_tokens: int = 48,
        model_tokens: int = 256,
        eos_ids: tuple[int, ...] = (),
        policy: Policy | None = None,
        max_repeat: int = 1,
        tick_ns: int = 1,
    ) -> None:
        spec = ModelSpec(
            path="/nonexistent",
            vocab_size=VOCAB,
            max_sequences=slots,
            max_step_tokens=step_tokens,
            max_model_tokens=model_tokens,
            block_tokens=block_tokens,
            num_blocks=blocks,
            plans_in_flight=plans_in_flight,
        )
        self.info = msgspec.structs.replace(describe(spec), tokens_ahead=tokens_ahead, eos_ids=eos_ids)
        self.device = SimulatedDevice(self.info)
        self.core = Core(self.info, FirstComeFirstServed() if policy is None else policy)
        self.max_repeat = max_repeat
        self.bursts = 0
        self.left: dict[int, int] = {}
        """Of each slot that is taken: known ids to compute; at 0 it decodes."""
        self.rows: list[int] = []
        self.answers: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []
        self.outputs: dict[int, list[int]] = {}
        self.finished: dict[int, Finished] = {}
        self.spans: list[SpanEvent] = []
        self.tick_ns = tick_ns
        """Between any two things that happen."""
        self.now = 1

    def submit(
        self,
        handle: int,
        prompt: Ids[int],
        max_tokens: int,
        min_tokens: int = 0,
        stop_ids: Ids[int] = (),
        *,
        deadline: int = 0,
        delivered: Ids[int] = (),
    ) -> None:
        """A request of one sample, traced."""
        self.outputs[handle] = list(delivered)
        sample = SubmitSample(handle, 0, 7, pack_u32(list(delivered)))
        self.core.submit(
            Submit(
                (sample,),
                pack_u32(list(prompt)),
                Sampling(),
                max_tokens,
                self.now,
                min_tokens,
                pack_u32(list(stop_ids)),
                deadline_ns=deadline,
                traced=True,
            )
        )

    def plan(self) -> StepPlan | None:
        """Make and compute one plan, through its encoding; its answer waits."""
        self.now += self.tick_ns
        plan = self.core.plan(self.now, self.max_repeat)
        if plan is not None:
            self.bursts += plan.repeat > 1
            self.plans.append(plan)
            self.check_plan(plan)
            self.answers.append(self.device.execute(decode_plan(encode_plan(plan))))
        self.check()
        return plan

    def check_plan(self, plan: StepPlan) -> None:
        """It keeps to the contract: it names only slots that are taken, and computes something within the budget."""
        released = unpack_u32(plan.release).tolist()
        for slot in released:
            del self.left[slot]
        for admission in plan.admissions:
            assert admission.slot not in self.left, "admitted to a slot that is taken"
            self.left[admission.slot] = admission.total_ids
        held = unpack_u32(plan.hold).tolist()
        for slot in held:
            assert self.left[slot] == 0, "a slot is held that does not decode"
            self.left[slot] = 1
        scheduled = dict(zip(unpack_u32(plan.schedule_slots), unpack_u32(plan.schedule_rows), strict=True))
        decoding = {slot for slot, left in self.left.items() if not left}
        for slot, rows in scheduled.items():
            assert 0 < rows <= self.left[slot]
            self.left[slot] -= rows
        named = {*unpack_u32(plan.block_slots), *(part.slot for part in plan.fragments)}
        assert self.left.keys() >= named, "a slot is named that nobody has"
        self.rows = self.rows if plan.rows is None else unpack_u32(plan.rows).tolist()
        assert sorted(self.rows) == sorted([*decoding, *scheduled]), "who takes part is who decodes or is scheduled"
        assert 0 < len(decoding) + sum(scheduled.values()) <= self.info.max_step_tokens
        if plan.repeat > 1:
            assert plan.repeat <= self.max_repeat
            assert not any([scheduled, held, plan.admissions, plan.fragments])

    def absorb(self) -> None:
        """Absorb the oldest answer."""
        self.now += self.tick_ns
        self.core.absorb(self.answers.popleft(), self.now)
        self.check()

    def lose_epoch(self) -> None:
        """The device is gone, with all that was in flight; another one takes its place."""
        self.now += self.tick_ns
        late = self.answers.popleft() if self.answers else None
        self.answers.clear()
        self.left.clear()
        self.device = SimulatedDevice(self.info)
        self.core.lose_epoch(self.now)
        self.check()
        assert not self.core.in_flight
        if late is not None:
            assert self.core.absorb(late, self.now) is None, "a result of an older epoch is dropped"
        self.check()

    def run(self, most_steps: int = 200_000) -> None:
        """Until nothing is left, plans in flight as far as allowed."""
        for _ in range(most_steps):
            if not self.core.has_work and not self.answers:
                self.drain()
                return
            plan = self.plan() if len(self.answers) < self.info.plans_in_flight else None
            assert self.answers, "nothing runs and somebody waits"
            if plan is None or len(self.answers) == self.info.plans_in_flight:
                self.absorb()
        raise AssertionError(f"not done after {most_steps} steps")

    def drain(self) -> None:
        """Collect what the core has to tell."""
        record = self.core.take_output()
        if record is None:
            return
        ids = iter(unpack_u32(record.ids))
        columns = zip(unpack_u32(record.handles), unpack_u32(record.offsets), record.counts, strict=True)
        for handle, offset, count in columns:
            assert offset == len(self.outputs[handle]), "an id is lost or doubled"
            assert handle not in self.finished, "a token after the end"
            self.outputs[handle] += [next(ids) for _ in range(count)]
        told = {span.handle for span in record.spans}.union(*(unpack_u32(step.handles) for step in record.steps))
        assert not told & self.finished.keys(), "something is told of who has ended"
        for finished in record.finished:
            assert finished.handle not in self.finished, "ended twice"
            assert finished.tokens == len(self.outputs[finished.handle])
            self.finished[finished.handle] = finished
        self.spans += record.spans

    def check(self) -> None:
        """No block leaked, freed twice or shared; tables fit the token counts; slots belong to one each."""
        self.drain()
        core = self.core
        held = [block for sequence in core._running for block in sequence.blocks]
        assert len(held) == len(set(held)), "a block belongs to two"
        assert sorted(held + core._pool._free) == list(range(core._pool.total)), "a block is lost or freed twice"
        slots = [sequence.slot for sequence in core._running]
        assert sorted(slots + core._free_slots) == list(range(self.info.max_sequences)), "a slot is lost"
        for sequence in core._running:
            assert sequence.state is State.RUNNING
            assert sequence.capacity == len(sequence.blocks) * self.info.block_tokens
            assert min(sequence.scheduled, sequence.limit - 1) <= sequence.capacity
            assert sequence.sampled_by <= self.info.tokens_ahead + 1
            assert sequence.ahead <= self.max_repeat * sequence.sampled_by
        assert core._waiting_tokens == sum(sequence.waiting_tokens for sequence in core._policy)

    def at_rest(self) -> bool:
        """Whether nothing at all is held."""
        load = self.core.load(self.now, 0, 0)
        return (load.free_blocks, load.running, load.waiting, load.waiting_tokens) == (load.total_blocks, 0, 0, 0)


def random_prompt(rng: random.Random, most: int) -> "array[int]":
    """Between one and ``most`` ids."""
    return array("I", [rng.randrange(VOCAB) for _ in range(rng.randint(1, most))])
