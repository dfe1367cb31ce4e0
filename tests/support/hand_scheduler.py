"""A scheduler small enough to trust by reading it: it drives an executor with plans of every kind.

It cuts prompts into random chunks, admits at random moments, preempts and holds at random (also with tokens in
flight), hands out blocks in random order and keeps as many plans in flight as the executor allows.
"""

from __future__ import annotations

import random
import select
from collections import deque
from dataclasses import dataclass, field

from penstock.executor.executor import Executor
from penstock.executor.step import (
    Admission,
    ModelInfo,
    Sampling,
    StepPlan,
    StepResult,
    Stopping,
    pack_u32,
    unpack_u32,
)

RESULT_SECONDS = 30.0
GREEDY = Sampling(temperature=0.0)


@dataclass(eq=False)
class Request:
    """One sequence from prompt to end."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    output: list[int] = field(default_factory=list)
    failure: str | None = None
    preempted: int = 0
    preempted_in_flight: int = 0
    slot: int = -1
    scheduled: int = 0
    """Rows that plans have computed since the admission."""
    in_flight: int = 0
    ahead: int = 0
    """Tokens that plans in flight will make."""
    active: bool = False
    """The device computes it in every plan."""
    blocks: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """By the rules that the device has."""
        stopped = bool(self.output) and self.output[-1] in self.stop_ids
        return stopped or len(self.output) >= self.max_tokens or self.failure is not None


@dataclass
class Draft:
    """A plan in the making."""

    admissions: list[Admission] = field(default_factory=list)
    appended: list[tuple[int, int]] = field(default_factory=list)
    hold: list[int] = field(default_factory=list)
    chunks: dict[int, int] = field(default_factory=dict)
    members: list[tuple[Request, bool]] = field(default_factory=list)
    """Who takes part, and whether a token will be made."""


class HandScheduler:
    """Runs requests to their ends."""

    def __init__(
        self,
        executor: Executor,
        info: ModelInfo,
        *,
        seed: int = 0,
        preempt: float = 0.0,
        hold: float = 0.0,
        longest_chunk: int = 9,
    ) -> None:
        """``preempt`` and ``hold``: chance per plan and running request."""
        self.executor, self.info = executor, info
        self.random = random.Random(seed)
        self.preempt, self.hold, self.longest_chunk = preempt, hold, longest_chunk
        self.free_blocks = list(range(info.num_blocks))
        self.free_slots = list(range(info.max_sequences))
        self.release: list[int] = []
        self.flights: deque[tuple[list[tuple[Request, bool]], dict[int, Request]]] = deque()
        self.slots: list[int] | None = None
        self.number = 0
        self.silent = 0
        """Rows that made no token because their request had ended unbeknown to the plan."""

    def run(self, requests: list[Request]) -> None:
        """Until all have ended and every result is in."""
        waiting, running = deque(requests), list[Request]()
        while waiting or running or self.flights:
            plan = self._plan(waiting, running)
            if plan is not None:
                self.executor.submit(plan)
            if self.flights and (plan is None or len(self.flights) == self.info.plans_in_flight):
                self._absorb()
            for request in [request for request in running if request.ended]:
                running.remove(request)
                self._leave(request)

    def _plan(self, waiting: deque[Request], running: list[Request]) -> StepPlan | None:
        draft = Draft()
        for request in [request for request in running if self.random.random() < self.preempt]:
            running.remove(request)
            request.preempted += 1
            request.preempted_in_flight += request.ahead > 0
            self._leave(request)
            waiting.append(request)
        self._admit(draft, waiting, running)
        for request in running:
            self._take_part(draft, request)
        return self._build(draft, running) if draft.members or draft.hold else None

    def _admit(self, draft: Draft, waiting: deque[Request], running: list[Request]) -> None:
        while waiting and self.free_slots and not waiting[0].in_flight and self.random.random() < 0.7:
            request = waiting.popleft()
            if request.ended:
                continue  # by the token that was in flight when it was preempted
            request.slot = self.free_slots.pop()
            ids = request.prompt + request.output
            stopping = Stopping(request.max_tokens, request.min_tokens, pack_u32(request.stop_ids))
            draft.admissions.append(
                Admission(
                    request.slot,
                    pack_u32(ids),
                    len(ids),
                    len(request.prompt),
                    request.sampling,
                    stopping,
                    request.seed,
                )
            )
            running.append(request)

    def _take_part(self, draft: Draft, request: Request) -> None:
        if len(request.output) + request.ahead >= request.max_tokens:
            return
        left = len(request.prompt) + len(request.output) + request.ahead - request.scheduled
        rows = 1
        if not request.active or left > 1:
            rows = self.random.randint(1, min(left, self.longest_chunk))
            draft.chunks[request.slot] = rows
        elif self.random.random() < self.hold:
            request.active = False
            draft.hold.append(request.slot)
            return
        request.scheduled += rows
        request.in_flight += 1
        request.ahead += rows == left
        request.active = rows == left
        draft.members.append((request, rows == left))
        while len(request.blocks) * self.info.block_tokens < request.scheduled:
            block = self.free_blocks.pop(self.random.randrange(len(self.free_blocks)))
            request.blocks.append(block)
            draft.appended.append((request.slot, block))

    def _build(self, draft: Draft, running: list[Request]) -> StepPlan:
        slots = [request.slot for request, _ in draft.members]
        same, self.slots = slots == self.slots, slots
        self.flights.append((draft.members, {request.slot: request for request in running}))
        self.number += 1
        release, self.release = self.release, []
        return StepPlan(
            epoch=1,
            number=self.number,
            release=pack_u32(release),
            admissions=tuple(draft.admissions),
            block_slots=pack_u32([slot for slot, _ in draft.appended]),
            block_ids=pack_u32([block for _, block in draft.appended]),
            hold=pack_u32(draft.hold),
            schedule_slots=pack_u32(list(draft.chunks)),
            schedule_rows=pack_u32(list(draft.chunks.values())),
            rows=None if same else pack_u32(slots),
        )

    def _absorb(self) -> None:
        for result in self._next_results():
            members, at_slot = self.flights.popleft()
            for failure in result.failed:
                at_slot[failure.slot].failure = failure.reason
            tokens = iter(unpack_u32(result.ids))
            assert len(result.counts) == len(members)
            for (request, makes), count in zip(members, result.counts, strict=True):
                request.in_flight -= 1
                request.ahead -= makes
                if count:
                    assert makes
                    assert not request.ended
                    request.output.append(next(tokens))
                elif makes:
                    assert request.ended
                    self.silent += 1
            assert not list(tokens)

    def _next_results(self) -> list[StepResult]:
        """What is there, at least one: a wake-up may come after its result was taken with the one before."""
        results: list[StepResult] = []
        while not results:
            readable, _, _ = select.select([self.executor.fileno()], [], [], RESULT_SECONDS)
            assert readable, "no result in time"
            results = list(self.executor.results())
        return results

    def _leave(self, request: Request) -> None:
        self.release.append(request.slot)
        self.free_slots.append(request.slot)
        self.free_blocks += request.blocks
        request.blocks = []
        request.slot, request.scheduled, request.active = -1, 0, False
