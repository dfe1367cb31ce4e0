"""What the host knows of the slots: enough to compose the next step while the device still computes this one.

The host knows which ids a slot was given, how many of them are scheduled and which blocks it has. It does not know
what was sampled since, nor whether a slot has stopped: the device knows, and counts only the rows of live slots.
So of a slot that decodes, ``scheduled`` is what it has computed if it has not stopped.

Whatever is wrong with one slot fails that slot and nothing else.
"""

from __future__ import annotations

import enum
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.executor.models.errors import one_line
from penstock.executor.step import Admission, Fragment, SlotFailure, StepPlan, unpack_u32
from penstock.executor.worker.device.changes import Changes
from penstock.executor.worker.slots import MANY, Capacity, SlotFault, refuse_unsupported
from penstock.kernels.attention.decode_shapes import Spread
from penstock.kernels.batch.state import MAX_STOP_IDS, ArenaLayout

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]


class Stage(enum.IntEnum):
    """Where a slot stands."""

    EMPTY = 0
    KNOWN = 1
    """Takes part only in plans that schedule it: its known ids are computed in chunks, or it is held."""
    DECODING = 2
    """Takes part in every plan, a row at a time."""
    FAILED = 3
    """Nothing happens until it is released."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known ids of one slot that a step computes."""

    slot: int
    start: int
    ids: Ids
    completes: bool
    """Its last row is the newest known id: the next token is chosen from it."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one plan computes."""

    rows: Ints
    """The plan's rows: slots."""
    decodes: Ints
    """Slots that compute one row each, in the order of the rows."""
    chunks: list[Chunk]
    samples: Ints
    """Slots whose next token is chosen: the decodes, then the chunks that complete."""
    sample_rows: Ints
    """Where each of them stands in ``rows``."""
    filtered: bool
    """Whether one of them asks for top-k, top-p or min-p."""
    spread: Spread
    """How the lengths of the decodes differ."""
    longest: int
    """Tokens of the longest of them when the step is done."""


class Mirror:
    """All slots, as the host knows them."""

    def __init__(self, capacity: Capacity, layout: ArenaLayout) -> None:
        """Every slot is empty."""
        slots = capacity.max_sequences
        self.capacity = capacity
        self.changes = Changes(layout)
        """What :meth:`apply` and :meth:`compose` changed on the device."""
        self.failures: list[SlotFailure] = []
        """The slots that failed since the last :meth:`apply`."""
        self._ids: dict[int, array[int]] = {}
        self._fragments = [0] * slots
        self._stage = np.zeros(slots, np.int8)
        self._total = np.zeros(slots, np.int64)
        """Known ids at admission."""
        self._limit = np.zeros(slots, np.int64)
        """Tokens that the slot can ever hold."""
        self._scheduled = np.zeros(slots, np.int64)
        self._blocks = np.zeros(slots, np.int64)
        self._filtered = np.zeros(slots, np.bool_)
        self._rows: Ints = np.empty(0, np.int64)
        self._device_rows: Ints = np.empty(0, np.int64)
        """The decode batch that the device has."""
        self._chunks: dict[int, int] = {}

    # ---- differences ----

    def apply(self, plan: StepPlan) -> None:
        """Make the plan's changes in the order that the contract states.

        Raises ValueError for a plan whose columns do not match or name no slot: that is no single slot's fault.
        """
        self.failures = []
        self._stage[self._slots(plan.release)] = Stage.EMPTY
        for admission in plan.admissions:
            with self._isolated(admission.slot):
                self._admit(admission)
        for fragment in plan.fragments:
            with self._isolated(fragment.slot):
                self._extend(fragment)
        self._append_blocks(self._slots(plan.block_slots).tolist(), unpack_u32(plan.block_ids))
        self._hold(plan)
        if plan.rows is not None:
            self._set_rows(self._slots(plan.rows))
        self._schedule(self._slots(plan.schedule_slots).tolist(), unpack_u32(plan.schedule_rows))

    def _slots(self, packed: bytes) -> Ints:
        slots = np.frombuffer(packed, "<u4").astype(np.int64)
        if slots.size and int(slots.max()) >= self.capacity.max_sequences:
            raise ValueError(f"slot {int(slots.max())}, there are {self.capacity.max_sequences}")
        return slots

    @contextmanager
    def _isolated(self, slot: int) -> Iterator[None]:
        try:
            yield
        except SlotFault as fault:
            self._fail(slot, str(fault))
        except (ValueError, OverflowError) as error:  # numbers that do not fit, ids of odd length
            self._fail(slot, one_line(error))

    def _fail(self, slot: int, reason: str) -> None:
        self.failures.append(SlotFailure(slot, reason))
        if 0 <= slot < self.capacity.max_sequences:
            self._stage[slot] = Stage.FAILED
            self.changes.set_live(slot, False)

    def _admit(self, admission: Admission) -> None:
        slot, capacity = admission.slot, self.capacity
        if not 0 <= slot < capacity.max_sequences:
            raise SlotFault(f"there are {capacity.max_sequences} slots")
        if self._stage[slot] != Stage.EMPTY:
            raise SlotFault("admitted into a slot that is occupied")
        self._stage[slot] = Stage.KNOWN
        if not 1 <= admission.prompt_ids <= admission.total_ids <= capacity.max_model_tokens:
            counts = f"{admission.prompt_ids} prompt ids of {admission.total_ids} known ids"
            raise SlotFault(f"{counts} do not fit {capacity.max_model_tokens} tokens")
        if len(admission.stopping.stop_ids) > 4 * MAX_STOP_IDS:
            count = len(admission.stopping.stop_ids) // 4
            raise SlotFault(f"{count} stop ids, at most {MAX_STOP_IDS} are possible")
        refuse_unsupported(admission)
        self._ids[slot] = array("I")
        self._fragments[slot] = 0
        self._total[slot] = admission.total_ids
        self._limit[slot] = admission.prompt_ids + min(admission.stopping.max_tokens, MANY)
        self._scheduled[slot] = 0
        self._blocks[slot] = 0
        sampling = admission.sampling
        narrowed = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        self._filtered[slot] = narrowed and sampling.temperature > 0
        self._receive(slot, admission.ids)
        self.changes.admit(admission)

    def _receive(self, slot: int, packed: bytes) -> None:
        known = self._ids[slot]
        fresh = unpack_u32(packed)
        if len(known) + len(fresh) > self._total[slot]:
            raise SlotFault(f"more than the {self._total[slot]} known ids that were announced")
        if fresh and max(fresh) >= self.capacity.vocab_size:
            raise SlotFault(f"id {max(fresh)} is outside the vocabulary of {self.capacity.vocab_size}")
        known.extend(fresh)
        self._fragments[slot] += 1

    def _occupied(self, slot: int) -> bool:
        """Whether the slot takes changes: a failed one ignores them. Raises :class:`SlotFault` if it is empty."""
        if not 0 <= slot < self.capacity.max_sequences:
            raise SlotFault(f"there are {self.capacity.max_sequences} slots")
        if self._stage[slot] == Stage.EMPTY:
            raise SlotFault("the slot is empty")
        return bool(self._stage[slot] != Stage.FAILED)

    def _extend(self, fragment: Fragment) -> None:
        if not self._occupied(fragment.slot):
            return
        if fragment.index != self._fragments[fragment.slot]:
            raise SlotFault(f"fragment {fragment.index} came where {self._fragments[fragment.slot]} was due")
        self._receive(fragment.slot, fragment.ids)

    def _append_blocks(self, slots: Iterable[int], blocks: Iterable[int]) -> None:
        appended: defaultdict[int, list[int]] = defaultdict(list)
        for slot, block in zip(slots, blocks, strict=True):
            appended[slot].append(block)
        for slot, added in appended.items():
            with self._isolated(slot):
                self._grow(slot, added)

    def _grow(self, slot: int, blocks: list[int]) -> None:
        if not self._occupied(slot):
            return
        first = int(self._blocks[slot])
        end = first + len(blocks)
        if end > self.capacity.table_width:
            raise SlotFault(f"{end} blocks, a table holds {self.capacity.table_width}")
        if max(blocks) >= self.capacity.num_blocks:
            raise SlotFault(f"block {max(blocks)}, there are {self.capacity.num_blocks}")
        self.changes.append_blocks(slot, first, blocks)
        self._blocks[slot] = end

    def _hold(self, plan: StepPlan) -> None:
        held = self._slots(plan.hold)
        self._stage[held[self._stage[held] == Stage.DECODING]] = Stage.KNOWN

    def _set_rows(self, rows: Ints) -> None:
        self._rows = rows
        found, counts = np.unique(rows, return_counts=True)
        for slot in found[counts > 1].tolist():
            self._fail(slot, "the slot stands in the plan's rows twice")

    def _schedule(self, slots: Iterable[int], rows: Iterable[int]) -> None:
        """A slot with known ids left computes a chunk; one that was held decodes again."""
        self._chunks = {}
        members = set(self._rows.tolist())
        for slot, count in zip(slots, rows, strict=True):
            with self._isolated(slot):
                if slot not in members:
                    raise SlotFault("the slot is scheduled and not in the plan's rows")
                if not self._occupied(slot):
                    continue
                if self._scheduled[slot] < self._total[slot]:
                    self._chunks[slot] = count
                elif count == 1:
                    self._stage[slot] = Stage.DECODING
                else:
                    raise SlotFault(f"{count} rows are scheduled, 1 id is known")

    # ---- the step ----

    def compose(self, repeat: int) -> Step:
        """The step of the plan that was applied, ``repeat`` times over if it is a burst of decodes.

        Raises ValueError for a burst of anything but decodes.
        """
        rows = self._rows
        if repeat > 1 and self._chunks:
            raise ValueError("a burst computes known ids")
        decoding = self._decoding(repeat)
        chunks = [chunk for slot in rows.tolist() if slot in self._chunks for chunk in self._chunk(slot)]
        self._show_rows(rows[decoding])
        completed = [chunk.slot for chunk in chunks if chunk.completes]
        samples = np.concatenate((rows[decoding], np.array(completed, np.int64)))
        sample_rows = np.flatnonzero(decoding)
        if completed:
            place = {slot: row for row, slot in enumerate(rows.tolist())}
            sample_rows = np.concatenate((sample_rows, np.array([place[slot] for slot in completed], np.int64)))
        filtered, spread = bool(self._filtered[samples].any()), self._spread(rows[decoding])
        longest = int(self._scheduled[rows[decoding]].max(initial=0))
        return Step(rows, rows[decoding], chunks, samples, sample_rows, filtered, spread, longest)

    def _spread(self, decodes: Ints) -> Spread:
        lengths = self._scheduled[decodes]
        return Spread.of(int(lengths.max(initial=0)), int(lengths.sum()), lengths.size)

    def _decoding(self, repeat: int) -> npt.NDArray[np.bool_]:
        """Which rows decode; those whose blocks do not hold what they compute fail."""
        rows = self._rows
        decoding: npt.NDArray[np.bool_] = self._stage[rows] == Stage.DECODING
        slots = rows[decoding]
        # What a row would compute behind its last token does not count and needs no block.
        end = np.minimum(self._scheduled[slots] + repeat, self._limit[slots] - 1)
        short = end > self._blocks[slots] * self.capacity.block_tokens
        if short.any():
            for slot, position in zip(slots[short].tolist(), end[short].tolist(), strict=True):
                self._fail(slot, f"no block for position {position - 1}")
            return self._decoding(repeat)
        self._scheduled[slots] += repeat
        return decoding

    def _chunk(self, slot: int) -> list[Chunk]:
        """The slot's chunk; none if it fails."""
        chunks: list[Chunk] = []
        with self._isolated(slot):
            chunks.append(self._take_chunk(slot, self._chunks[slot]))
        return chunks

    def _take_chunk(self, slot: int, rows: int) -> Chunk:
        start, known = int(self._scheduled[slot]), self._ids[slot]
        end = start + rows
        if not start < end <= len(known):
            raise SlotFault(f"{rows} rows from position {start} are scheduled, {len(known)} ids are known")
        if end > self._blocks[slot] * self.capacity.block_tokens:
            raise SlotFault(f"no block for position {end - 1}")
        self._scheduled[slot] = end
        completes = end == self._total[slot]
        if completes:
            self._stage[slot] = Stage.DECODING
            self.changes.set_live(slot, True)
            self.changes.set_column("computed", slot, end - 1)  # sampling from its last row counts that row
        return Chunk(slot, start, np.array(known[start:end], np.uint32).view(np.int32), completes)

    def _show_rows(self, decodes: Ints) -> None:
        """Change the device's decode batch where it differs."""
        padding = self.capacity.max_sequences
        before, after = self._device_rows, decodes
        width = max(len(before), len(after))
        differs = _padded(before, width, padding) != _padded(after, width, padding)
        for row in np.flatnonzero(differs).tolist():
            self.changes.set_row(row, int(after[row]) if row < len(after) else padding)
        self._device_rows = after


def _padded(values: Ints, width: int, filling: int) -> Ints:
    return np.concatenate((values, np.full(width - len(values), filling, np.int64)))
