"""A sequence: one prompt, its output so far, and what it holds."""

import enum
from array import array

from penstock.executor.step import Sampling, Stopping


class State(enum.IntEnum):
    """WAITING → RUNNING → FINISHED; a preempted sequence is WAITING again."""

    WAITING = 1
    RUNNING = 2
    FINISHED = 3


class Sequence:
    """One continuation of a prompt. Times are nanoseconds of the caller's clock; 0: has not happened.

    Counts of tokens, for a running sequence: ``len(ids)`` are known; ``ahead`` more are sampled by plans in flight and
    not known yet; ``scheduled`` are computed by the plans made so far.
    """

    __slots__ = (
        "active",
        "ahead",
        "arrival_ns",
        "blocks",
        "capacity",
        "deadline_ns",
        "decode_start_ns",
        "first_token_ns",
        "handle",
        "ids",
        "in_flight",
        "limit",
        "order",
        "preemptions",
        "priority_class",
        "prompt_tokens",
        "queued_ns",
        "sample_index",
        "sampled_by",
        "sampling",
        "scheduled",
        "seed",
        "slot",
        "started_ns",
        "state",
        "stop_ids",
        "stopping",
        "tenant",
        "traced",
        "unsent",
        "waiting_tokens",
    )

    def __init__(
        self,
        handle: int,
        ids: "array[int]",
        prompt_tokens: int,
        stopping: Stopping,
        stop_ids: frozenset[int],
        limit: int,
        arrival_ns: int,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        sample_index: int = 0,
        deadline_ns: int = 0,
        tenant: str = "",
        priority_class: int = 0,
        traced: bool = False,
    ) -> None:
        self.handle = handle
        self.ids = ids
        """Known ids: the prompt, then the output. Four bytes a token."""
        self.prompt_tokens = prompt_tokens
        self.stopping = stopping
        self.stop_ids = stop_ids
        self.limit = limit
        """Most ids, prompt and output together."""
        self.sampling = sampling or Sampling()
        self.seed = seed
        self.sample_index = sample_index
        self.tenant = tenant
        self.priority_class = priority_class
        self.traced = traced
        self.state = State.WAITING
        self.order = 0
        """Number of its arrival, given by the core."""
        self.slot = -1
        """-1: none."""
        self.blocks: list[int] = []
        self.capacity = 0
        """Tokens that its blocks hold."""
        self.scheduled = 0
        self.ahead = 0
        self.sampled_by = 0
        """Plans in flight that sample for it."""
        self.in_flight = 0
        """Plans in flight that it takes part in."""
        self.active = False
        """Whether the device computes it in every plan unless told otherwise."""
        self.unsent = 0
        """Known ids that its slot has still to be sent, in fragments; no more become known before."""
        self.waiting_tokens = 0
        """What it counts for in the queue."""
        self.preemptions = 0
        self.arrival_ns = arrival_ns
        self.deadline_ns = deadline_ns
        self.queued_ns = arrival_ns
        """When it began to wait, last."""
        self.started_ns = 0
        """When it was first admitted."""
        self.first_token_ns = 0
        self.decode_start_ns = 0
        """When its first token after the last admission was known."""

    @property
    def output_tokens(self) -> int:
        """Known tokens beyond the prompt."""
        return len(self.ids) - self.prompt_tokens

    @property
    def lives(self) -> bool:
        """Whether it has not ended."""
        return self.state is not State.FINISHED
