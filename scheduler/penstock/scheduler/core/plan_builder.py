"""The differences that one plan carries, gathered while it is made."""

from array import array

from penstock.executor.step import FRAGMENT_TOKENS, Admission, Fragment, StepPlan, pack_u32
from penstock.scheduler.core.blocks import BlockPool
from penstock.scheduler.core.sequence import Sequence


class PlanBuilder:
    """Collects what changes and which sequences take part; ``build`` makes the plan."""

    __slots__ = (
        "admissions",
        "block_ids",
        "block_slots",
        "chunks",
        "decodes",
        "fragments",
        "held",
        "rows_left",
        "schedule_rows",
        "schedule_slots",
    )

    def __init__(self, rows: int) -> None:
        self.rows_left = rows
        self.admissions: list[Admission] = []
        self.fragments: list[Fragment] = []
        self.block_slots: list[int] = []
        self.block_ids: list[int] = []
        self.held: list[Sequence] = []
        """Sequences that the device would compute and that sit this plan out."""
        self.schedule_slots: list[int] = []
        self.schedule_rows: list[int] = []
        self.decodes: list[Sequence] = []
        """Sequences that compute their last token."""
        self.chunks: list[tuple[Sequence, int]] = []
        """Sequences that compute known ids, and how many."""

    def admit(self, sequence: Sequence) -> None:
        """A sequence enters its slot."""
        ids = sequence.ids
        first = ids if len(ids) <= FRAGMENT_TOKENS else ids[:FRAGMENT_TOKENS]
        sequence.unsent = len(ids) - len(first)
        self.admissions.append(
            Admission(
                sequence.slot,
                first.tobytes(),
                len(ids),
                sequence.prompt_tokens,
                sequence.sampling,
                sequence.stopping,
                sequence.seed,
                sequence.sample_index,
            )
        )

    def send_fragment(self, sequence: Sequence) -> None:
        """Send the next of the known ids that the admission could not carry."""
        start = len(sequence.ids) - sequence.unsent
        part: array[int] = sequence.ids[start : start + FRAGMENT_TOKENS]
        self.fragments.append(Fragment(sequence.slot, start // FRAGMENT_TOKENS, part.tobytes()))
        sequence.unsent -= len(part)

    def add_block(self, sequence: Sequence, pool: BlockPool) -> None:
        """A sequence's block table grows by a free block."""
        block = pool.take()
        sequence.blocks.append(block)
        sequence.capacity += pool.block_tokens
        self.block_slots.append(sequence.slot)
        self.block_ids.append(block)

    def schedule(self, sequence: Sequence, rows: int) -> None:
        """A sequence computes that many ids which the device knows."""
        self.schedule_slots.append(sequence.slot)
        self.schedule_rows.append(rows)

    def count_chunks(self) -> frozenset[Sequence]:
        """Count the chunks as planned; returns the sequences of which known ids are left: they sample nothing."""
        silent = []
        for sequence, rows in self.chunks:
            sequence.scheduled += rows
            sequence.in_flight += 1
            if sequence.scheduled == len(sequence.ids):
                sequence.ahead += 1
                sequence.sampled_by += 1
                sequence.active = True
            else:
                silent.append(sequence)
        return frozenset(silent)

    @property
    def only_decodes(self) -> bool:
        """Whether nothing is in the plan but sequences that go on decoding, and blocks for them."""
        others = self.admissions or self.fragments or self.held or self.schedule_slots or self.chunks
        return bool(self.decodes) and not others

    def forget(self, sequence: Sequence) -> None:
        """A sequence gives way while the plan is made: take back what the plan had for it."""
        slot = sequence.slot
        if sequence in self.decodes:
            self.decodes.remove(sequence)
            self.rows_left += 1
        if sequence in self.held:
            self.held.remove(sequence)
        self.block_slots, self.block_ids = _without(slot, self.block_slots, self.block_ids)
        self.schedule_slots, self.schedule_rows = _without(slot, self.schedule_slots, self.schedule_rows)

    def build(self, epoch: int, number: int, release: list[int], rows: bytes | None, repeat: int) -> StepPlan:
        """The plan."""
        return StepPlan(
            epoch,
            number,
            pack_u32(release),
            tuple(self.admissions),
            tuple(self.fragments),
            pack_u32(self.block_slots),
            pack_u32(self.block_ids),
            pack_u32([sequence.slot for sequence in self.held]),
            pack_u32(self.schedule_slots),
            pack_u32(self.schedule_rows),
            rows,
            repeat=repeat,
        )


def _without(slot: int, slots: list[int], values: list[int]) -> tuple[list[int], list[int]]:
    kept = [i for i, other in enumerate(slots) if other != slot]
    return [slots[i] for i in kept], [values[i] for i in kept]
