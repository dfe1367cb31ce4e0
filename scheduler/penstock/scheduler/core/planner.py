"""The core: ``plan`` says what the next step computes, ``absorb`` takes in what a step produced.

A step is filled in this order, within its budget of rows:

1. every running sequence that has one token left to compute (it decodes);
2. running sequences with more left (chunks of their prompts, or of what a preemption made them forget);
3. waiting sequences, as the policy orders them, while slots and blocks last.

A sequence enters with blocks for all its known tokens and one more, so that only decoding can run out of them; then the
policy names a victim, which frees everything, waits, and computes it all again (recompute preemption). The first of all
always goes on, since the pool holds at least one sequence of full length: nothing can lock up.

A plan of nothing but decodes may be a *burst*: the device repeats the step by itself, each sequence by its own tokens.

A plan may be made while others are in flight. ``Sequence.ahead`` counts what they sample and nobody knows yet; a
sequence whose last possible token is among it has nothing left to compute and leaves its slot at once, its results
still to come. Everything is deterministic: time comes in as ``now``, in nanoseconds.
"""

from collections import deque

from penstock.executor.step import ModelInfo, StepPlan, StepResult, unpack_u32
from penstock.scheduler.core.blocks import BlockPool
from penstock.scheduler.core.bursts import DEADLINE_NS, reserve_burst
from penstock.scheduler.core.deadlines import Deadlines
from penstock.scheduler.core.flight import Flight
from penstock.scheduler.core.intake import sequences_of
from penstock.scheduler.core.output import Output
from penstock.scheduler.core.plan_builder import PlanBuilder
from penstock.scheduler.core.policies import Policy
from penstock.scheduler.core.rows import RowOrder
from penstock.scheduler.core.sequence import Sequence, State
from penstock.scheduler.records.commands import Submit
from penstock.scheduler.records.events import Finish, Load, Span, Step


class Core:
    """All requests and all blocks of one replica. Not thread-safe; no method blocks.

    Raises ValueError if the blocks do not hold one sequence of full length.
    """

    def __init__(self, info: ModelInfo, policy: Policy, *, epoch: int = 1, traced_step_every: int = 16) -> None:
        if info.max_model_tokens > info.num_blocks * info.block_tokens:
            raise ValueError(
                f"{info.num_blocks} blocks of {info.block_tokens} tokens hold no sequence of {info.max_model_tokens}"
            )
        self._info = info
        self._policy = policy
        self._epoch = epoch
        self._pool = BlockPool(info.num_blocks, info.block_tokens)
        self._free_slots = list(range(info.max_sequences - 1, -1, -1))
        self._sequences: dict[int, Sequence] = {}
        self._running: dict[Sequence, None] = {}
        self._release: list[int] = []
        self._flights: deque[Flight] = deque()
        self._deadlines = Deadlines(self._sequences)
        self._number = 0
        self._arrivals = 0
        self._rows = RowOrder()
        self._waiting_tokens = 0
        self._preemptions = 0
        self._preemptions_in_flight = 0
        self.output = Output(traced_step_every)
        """What happened since take_output was last called."""

    # ---- what comes in ----

    def submit(self, request: Submit) -> None:
        """Queue every sample of a request. Raises ValueError, and nothing has happened, if it can never run."""
        sequences = sequences_of(request, self._info)
        if any(sequence.handle in self._sequences for sequence in sequences):
            raise ValueError("a handle is taken")
        for sequence in sequences:
            self._enter(sequence)

    def _enter(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.order = self._arrivals
        self._sequences[sequence.handle] = sequence
        self._wait(sequence, sequence.arrival_ns)
        if sequence.deadline_ns:
            self._deadlines.add(sequence)
        self._finish_if_complete(sequence, sequence.arrival_ns)

    def refuse(self, request: Submit, why: str, now: int) -> None:
        """Tell that a request failed which ``submit`` did not take: it alone ends."""
        for sample in request.samples:
            if sample.handle not in self._sequences:
                self.output.refuse(sample.handle, request.arrival_ns, now, why)

    def cancel(self, handle: int, now: int) -> None:
        """End a sequence; an unknown handle is ignored."""
        sequence = self._sequences.get(handle)
        if sequence is not None:
            self._finish(sequence, Finish.CANCELLED, now)

    def expire(self, now: int) -> None:
        """End every sequence whose deadline has passed."""
        for sequence in self._deadlines.passed(now):
            self._finish(sequence, Finish.DEADLINE, now)

    # ---- plan ----

    def plan(self, now: int, max_repeat: int = 1) -> StepPlan | None:
        """The next step, or None if there is nothing to compute now. The plan counts as submitted.

        ``max_repeat``: most steps of a burst, if the plan can be one; at least 1.
        """
        builder = PlanBuilder(self._info.max_step_tokens)
        prefilling = self._plan_decodes(builder, now)
        self._plan_chunks(builder, prefilling)
        self._admit(builder, now)
        return self._close(builder, now, 1 if prefilling else self._repeat(builder, now, max_repeat))

    def _repeat(self, builder: PlanBuilder, now: int, most: int) -> int:
        """Steps of the plan: more than one only if nobody waits and no deadline is near."""
        if most == 1 or len(self._policy) or self._deadlines.within(DEADLINE_NS, now):
            return 1
        return reserve_burst(builder, self._pool, most)

    def _plan_decodes(self, builder: PlanBuilder, now: int) -> list[Sequence]:
        """Give a row to everyone who has one token left to compute; returns those who have more."""
        prefilling: list[Sequence] = []
        decodes = builder.decodes
        tokens_ahead = self._info.tokens_ahead
        for sequence in list(self._running):
            if sequence.slot < 0:
                continue  # it gave way to one before it
            ahead = sequence.ahead
            length = len(sequence.ids) + ahead
            scheduled = sequence.scheduled
            if length - scheduled != 1 or sequence.unsent:
                prefilling.append(sequence)
            elif length >= sequence.limit:
                self._leave(sequence)
            elif sequence.sampled_by > tokens_ahead or builder.rows_left <= 0:
                if sequence.active:
                    sequence.active = False
                    builder.held.append(sequence)
            elif scheduled < sequence.capacity or self._grow(sequence, builder, now):
                decodes.append(sequence)
                builder.rows_left -= 1
                if not sequence.active:
                    sequence.active = True
                    builder.schedule(sequence, 1)
        return prefilling

    def _grow(self, sequence: Sequence, builder: PlanBuilder, now: int) -> bool:
        """Give one more block, another sequence's if need be. False if the sequence itself had to give way."""
        while not self._pool.free:
            victim = self._policy.victim(self._running, sequence)
            builder.forget(victim)
            self._preempt(victim, "blocks", now)
            if victim is sequence:
                return False
        builder.add_block(sequence, self._pool)
        return True

    def _plan_chunks(self, builder: PlanBuilder, prefilling: list[Sequence]) -> None:
        for sequence in prefilling:
            if builder.rows_left <= 0:
                return
            if sequence.slot >= 0:
                if sequence.unsent:
                    builder.send_fragment(sequence)
                self._chunk(sequence, builder)

    def _chunk(self, sequence: Sequence, builder: PlanBuilder) -> None:
        """Compute known ids of a sequence, as many as are sent and as there is room for: at least one."""
        rows = min(len(sequence.ids) - sequence.unsent - sequence.scheduled, builder.rows_left)
        builder.rows_left -= rows
        builder.chunks.append((sequence, rows))
        builder.schedule(sequence, rows)

    def _admit(self, builder: PlanBuilder, now: int) -> None:
        while builder.rows_left > 0 and self._free_slots:
            sequence = self._policy.next(now)
            if sequence is None or sequence.in_flight:
                return  # a preempted one comes back only when all of its tokens are known
            tokens = min(len(sequence.ids) + 1, sequence.limit)
            if self._pool.needed(tokens) > self._pool.free:
                return
            self._start(sequence, now)
            builder.admit(sequence)
            while sequence.capacity < tokens:
                builder.add_block(sequence, self._pool)
            self._chunk(sequence, builder)

    def _start(self, sequence: Sequence, now: int) -> None:
        self._policy.remove(sequence)
        self._waiting_tokens -= sequence.waiting_tokens
        sequence.state = State.RUNNING
        sequence.slot = self._free_slots.pop()
        self._running[sequence] = None
        sequence.started_ns = sequence.started_ns or now
        sequence.decode_start_ns = 0
        if sequence.traced:
            self.output.span(Span.QUEUED, sequence, sequence.queued_ns, now, step=self._number + 1)

    def _close(self, builder: PlanBuilder, now: int, repeat: int) -> StepPlan | None:
        """Count what the plan does, and record it as in flight."""
        members = [*builder.decodes, *(sequence for sequence, _ in builder.chunks)]
        if not members:
            for sequence in builder.held:
                sequence.active = True  # nobody was told
            return None
        for sequence in builder.decodes:
            sequence.scheduled += repeat
            sequence.ahead += repeat
            sequence.sampled_by += 1
            sequence.in_flight += 1
        silent = builder.count_chunks()
        rows = self._rows.order(members)
        self._number += 1
        plan = builder.build(self._epoch, self._number, self._release, rows, repeat)
        self._release.clear()
        decodes, ordered = len(builder.decodes), self._rows
        flight = Flight(
            self._number, ordered.sequences, ordered.slots, builder.chunks, decodes, silent, repeat=repeat, now=now
        )
        self._flights.append(flight)
        return plan

    # ---- absorb ----

    def absorb(self, result: StepResult, now: int) -> Flight | None:
        """Take in the result of the oldest plan in flight; None for one of an older epoch, which changes nothing.

        Raises ValueError for any other.
        """
        if result.epoch < self._epoch:
            return None
        flight = self._flights[0] if self._flights else None
        if flight is None or (result.epoch, result.number) != (self._epoch, flight.number):
            raise ValueError(f"result {result.epoch}.{result.number} answers no plan that is next")
        flight.check(result)
        self._flights.popleft()
        self.output.step(flight, result, len(self._policy), now)
        self._absorb_rows(flight, result, now)
        for failure in result.failed:
            self._absorb_failure(flight, failure.slot, failure.reason, now)
        return flight

    def _absorb_rows(self, flight: Flight, result: StepResult, now: int) -> None:
        tokens = iter(unpack_u32(result.ids))
        silent = flight.silent
        output = self.output
        for sequence, count in zip(flight.members, result.counts, strict=True):
            sequence.in_flight -= 1
            if sequence not in silent:
                sequence.ahead -= flight.repeat
                sequence.sampled_by -= 1
            if not count:
                continue
            ids = sequence.ids
            if sequence.state is State.FINISHED:
                for _ in range(count):
                    next(tokens)  # it was cancelled after this plan was made
                continue
            output.handles.append(sequence.handle)
            output.offsets.append(len(ids) - sequence.prompt_tokens)
            output.counts.append(count)
            token = next(tokens)
            ids.append(token)
            output.ids.append(token)
            for _ in range(count - 1):  # of a burst; outside of it a loop costs more than what it does
                token = next(tokens)
                ids.append(token)
                output.ids.append(token)
            if not sequence.decode_start_ns:
                self._first_token(sequence, flight, now)
            if token in sequence.stop_ids:
                self._finish(sequence, Finish.STOP, now)
            elif len(ids) >= sequence.limit:
                self._finish(sequence, Finish.LENGTH, now)

    def _first_token(self, sequence: Sequence, flight: Flight, now: int) -> None:
        if sequence.state is State.RUNNING:
            sequence.decode_start_ns = now
        if not sequence.first_token_ns:
            sequence.first_token_ns = now
            if sequence.traced:
                self.output.span(Span.FIRST_TOKEN, sequence, now, now, step=flight.number)

    def _absorb_failure(self, flight: Flight, slot: int, reason: str, now: int) -> None:
        for sequence, its_slot in zip(flight.members, flight.slots, strict=True):
            if its_slot == slot and sequence.state is not State.FINISHED:
                self._finish(sequence, Finish.FAILED, now, reason)

    # ---- comings and goings ----

    def _wait(self, sequence: Sequence, now: int) -> None:
        sequence.state = State.WAITING
        sequence.queued_ns = now
        sequence.waiting_tokens = len(sequence.ids)
        self._waiting_tokens += sequence.waiting_tokens
        self._policy.push(sequence, now)

    def _leave(self, sequence: Sequence) -> None:
        """Free slot and blocks: the next plan releases the slot, and may use both."""
        if sequence.slot < 0:
            return
        del self._running[sequence]
        self._release.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        self._pool.give_back(sequence.blocks)
        sequence.slot = -1
        sequence.blocks.clear()
        sequence.capacity = 0
        sequence.active = False
        self._rows.forget()

    def lose_epoch(self, now: int) -> None:
        """All that was on the device is gone, plans in flight too: who had a slot waits, in its old place.

        What was delivered stays; the rest is computed again.
        """
        self._epoch += 1
        self._number = 0
        self._flights.clear()
        for sequence in self._sequences.values():
            sequence.ahead = sequence.sampled_by = sequence.in_flight = 0
            if sequence.state is State.RUNNING:
                self._preempt(sequence, "epoch", now)
        self._release.clear()

    def _preempt(self, victim: Sequence, cause: str, now: int) -> None:
        self._preemptions += 1
        self._preemptions_in_flight += victim.ahead > 0
        victim.preemptions += 1
        if victim.traced:
            self._trace_decode(victim, now)
            self.output.span(Span.PREEMPTED, victim, now, now, victim.scheduled, cause=cause)
        self._leave(victim)
        victim.scheduled = 0
        self._wait(victim, now)

    def _finish(self, sequence: Sequence, reason: Finish, now: int, detail: str = "") -> None:
        if sequence.traced:
            if sequence.state is State.WAITING:
                self.output.span(Span.QUEUED, sequence, sequence.queued_ns, now)
            self._trace_decode(sequence, now)
        if sequence.state is State.WAITING:
            self._policy.remove(sequence)
            self._waiting_tokens -= sequence.waiting_tokens
        self._leave(sequence)
        sequence.state = State.FINISHED
        del self._sequences[sequence.handle]
        self.output.end(sequence, reason, now, detail)

    def _finish_if_complete(self, sequence: Sequence, now: int) -> None:
        """What an earlier attempt delivered may be all there is."""
        if sequence.output_tokens and sequence.ids[-1] in sequence.stop_ids:
            self._finish(sequence, Finish.STOP, now)
        elif len(sequence.ids) >= sequence.limit:
            self._finish(sequence, Finish.LENGTH, now)

    def _trace_decode(self, sequence: Sequence, now: int) -> None:
        if sequence.decode_start_ns:
            self.output.span(Span.DECODE, sequence, sequence.decode_start_ns, now, sequence.output_tokens)
            sequence.decode_start_ns = 0

    # ---- what can be asked ----

    @property
    def in_flight(self) -> int:
        """Plans that are not answered yet."""
        return len(self._flights)

    @property
    def has_work(self) -> bool:
        """Whether there is any sequence."""
        return bool(self._sequences)

    @property
    def last_flight(self) -> Flight | None:
        """The plan made last, if it is not answered yet."""
        return self._flights[-1] if self._flights else None

    def take_output(self) -> Step | None:
        """What happened since the last call; None if nothing did."""
        return self.output.take() if self.output else None

    def load(self, now: int, steps: int, step_us: int) -> Load:
        """How full the core is."""
        oldest = self._policy.next(now)
        return Load(
            len(self._policy),
            self._waiting_tokens,
            (now - oldest.queued_ns) // 1_000_000 if oldest else 0,
            len(self._running),
            self._info.max_sequences,
            self._pool.free,
            self._pool.total,
            step_us,
            steps,
            self._preemptions,
            self._preemptions_in_flight,
        )
