"""In which order the members of a plan stand in its rows."""

from array import array
from operator import attrgetter

from penstock.scheduler.core.sequence import Sequence

_computed = attrgetter("scheduled")


class RowOrder:
    """Longest context first, since unsorted lengths cost the device time; sorted anew only when the members change."""

    __slots__ = ("_members", "sequences", "slots")

    def __init__(self) -> None:
        self._members: list[Sequence] = []
        self.sequences: list[Sequence] = []
        """The members in the order of the rows."""
        self.slots = array("I")
        """The slot of each."""

    def order(self, members: list[Sequence]) -> bytes | None:
        """The slots in the order of the rows, u32; None: the members, and with them the rows, are those of before."""
        if members == self._members:
            return None
        self._members = members
        self.sequences = sorted(members, key=_computed, reverse=True)
        self.slots = array("I", [sequence.slot for sequence in self.sequences])
        return self.slots.tobytes()

    def forget(self) -> None:
        """The next rows are told whatever they are: slots have changed hands; who is gone is not held."""
        self._members = []
        self.sequences = []
