"""A plan on its way: what its result will be about."""

from array import array

from penstock.executor.step import StepResult
from penstock.scheduler.core.sequence import Sequence


class Flight:
    """A plan that is not answered yet."""

    __slots__ = ("chunks", "decodes", "members", "number", "plan_ns", "repeat", "silent", "slots", "submitted_ns")

    def __init__(
        self,
        number: int,
        members: list[Sequence],
        slots: "array[int]",
        chunks: list[tuple[Sequence, int]],
        decodes: int,
        silent: frozenset[Sequence],
        *,
        repeat: int,
        now: int,
    ) -> None:
        self.number = number
        self.members = members
        """The sequence of each row, in the plan's order of rows."""
        self.slots = slots
        """The slot that each had."""
        self.chunks = chunks
        """Who computes known ids, and how many."""
        self.decodes = decodes
        """How many decode."""
        self.silent = silent
        """Members that sample nothing: known ids are left after this plan."""
        self.repeat = repeat
        """Steps of it, and most tokens of a member."""
        self.submitted_ns = now
        self.plan_ns = 0
        """Time to make the plan; set by whoever measures it."""

    def check(self, result: StepResult) -> None:
        """Raises ValueError for a result whose columns are not those of the plan."""
        if len(result.counts) != len(self.members):
            raise ValueError(f"result {result.number} has {len(result.counts)} rows of {len(self.members)}")
        if 4 * sum(result.counts) != len(result.ids):
            raise ValueError(f"result {result.number} has {len(result.ids)} bytes of {sum(result.counts)} ids")

    @property
    def prefill_rows(self) -> int:
        """Known ids that it computes."""
        return sum(rows for _, rows in self.chunks)
