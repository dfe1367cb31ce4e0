"""The slots of a worker: plans change them by differences, a step is composed from them, its tokens go back in.

One step is :meth:`BatchState.apply` → :meth:`BatchState.compose` → the model and the sampler →
:meth:`BatchState.absorb`. Whatever is wrong with one slot fails that slot and nothing else.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from penstock.executor.models.errors import one_line
from penstock.executor.step import Admission, Fragment, SlotFailure, StepPlan, unpack_u32
from penstock.executor.worker.slots import Capacity, Slot, SlotFault, SlotTensors, Stage
from penstock.executor.worker.step_input import Choosing, Chunk, StepInput


class BatchState:
    """All slots. Tensors are the truth for what a step changes, :class:`Slot` objects for the rest."""

    def __init__(self, capacity: Capacity) -> None:
        """Every slot is empty."""
        self.capacity = capacity
        self.tensors = SlotTensors.allocate(capacity)
        self.rows: array[int] = array("I")
        """The slots that take part in this step."""
        self.failures: list[SlotFailure] = []
        """The slots that failed in this step."""
        self._slots: dict[int, Slot] = {}
        self._scheduled: dict[int, int] = {}
        self._decoding: Choosing | None = None
        """The slots of ``rows`` that decode; None: to be gathered again."""

    def apply(self, plan: StepPlan) -> None:
        """Make the plan's changes in the order that the contract states.

        Raises ValueError for a plan whose columns do not match: that is no single slot's fault.
        """
        self.failures = []
        self._release(unpack_u32(plan.release))
        for admission in plan.admissions:
            with self._isolated(admission.slot):
                self._admit(admission)
        for fragment in plan.fragments:
            with self._isolated(fragment.slot):
                self._extend(fragment)
        self._append_blocks(unpack_u32(plan.block_slots), unpack_u32(plan.block_ids))
        self._hold(unpack_u32(plan.hold))
        self._schedule(unpack_u32(plan.schedule_slots), unpack_u32(plan.schedule_rows))
        if plan.rows is not None:
            self._set_rows(unpack_u32(plan.rows))

    def compose(self) -> StepInput | None:
        """The rows of this step; None if there are none."""
        decoding = self._decodes()
        chunks = self._chunks() if self._scheduled else []
        block_tokens = self.capacity.block_tokens
        if chunks:
            return StepInput.of_mixed(decoding, chunks, self.tensors, block_tokens)
        if decoding.slots.numel():
            return StepInput.of_decodes(decoding, self.tensors, block_tokens)
        return None

    def absorb(self, step: StepInput, tokens: Tensor, sound: Tensor) -> dict[int, int]:
        """Take in the chosen ``tokens`` int64 [samples]; rows that are not ``sound`` (bool [samples]) fail.

        Returns slot → token for the slots that made one.
        """
        tensors, choosing = self.tensors, step.choosing
        slots, outputs = choosing.slots, tensors.outputs[choosing.slots] + 1
        tensors.computed.index_add_(0, step.slots, step.lengths)
        tensors.last_token[slots] = tokens
        tensors.outputs[slots] = outputs
        ended = (outputs >= choosing.max_tokens) | (tokens[:, None] == choosing.stop_ids).any(dim=1)
        for slot in slots[ended].tolist():
            self._change(slot, Stage.INERT)
        made = dict(zip(slots.tolist(), tokens.tolist(), strict=True))
        for slot in slots[~sound].tolist():
            self._fail(slot, "the model's logits are not finite")
            del made[slot]
        return made

    # ---- faults ----

    @contextmanager
    def _isolated(self, slot: int) -> Iterator[None]:
        """A fault inside fails this slot alone."""
        try:
            yield
        except SlotFault as fault:
            self._fail(slot, str(fault))
        except (ValueError, RuntimeError, OverflowError) as error:  # torch raises these for numbers that do not fit
            self._fail(slot, one_line(error))

    def _fail(self, slot: int, reason: str) -> None:
        self.failures.append(SlotFailure(slot, reason))
        if slot in self._slots:
            self._change(slot, Stage.INERT)

    def _change(self, slot: int, stage: Stage) -> None:
        self._slots[slot].stage = stage
        self._decoding = None

    def _live(self, number: int) -> Slot | None:
        """The slot; None if it is inert. Raises :class:`SlotFault` if it is empty."""
        slot = self._slots.get(number)
        if slot is None:
            raise SlotFault("the slot is empty")
        return None if slot.stage is Stage.INERT else slot

    # ---- differences ----

    def _release(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._slots.pop(slot, None)
            self._decoding = None

    def _admit(self, admission: Admission) -> None:
        number = admission.slot
        if not 0 <= number < self.capacity.max_sequences:
            raise SlotFault(f"there are {self.capacity.max_sequences} slots")
        if number in self._slots:
            raise SlotFault("admitted into a slot that is occupied")
        # Occupied before it is checked: a faulty one is inert until released, not empty.
        self._slots[number] = Slot.inert()
        slot = Slot.admit(admission, self.capacity)
        self.tensors.admit(admission)
        self._slots[number] = slot

    def _extend(self, fragment: Fragment) -> None:
        slot = self._live(fragment.slot)
        if slot is None:
            return
        if fragment.index != slot.fragments:
            raise SlotFault(f"fragment {fragment.index} came where {slot.fragments} was due")
        slot.receive(fragment.ids, self.capacity.vocab_size)

    def _append_blocks(self, slots: Iterable[int], blocks: Iterable[int]) -> None:
        appended: defaultdict[int, list[int]] = defaultdict(list)
        for slot, block in zip(slots, blocks, strict=True):
            appended[slot].append(block)
        for slot, added in appended.items():
            with self._isolated(slot):
                self._grow(slot, added)

    def _grow(self, number: int, blocks: list[int]) -> None:
        slot = self._live(number)
        if slot is None:
            return
        end = slot.blocks + len(blocks)
        if end > self.capacity.table_width:
            raise SlotFault(f"{end} blocks, a table holds {self.capacity.table_width}")
        if max(blocks) >= self.capacity.num_blocks:
            raise SlotFault(f"block {max(blocks)}, there are {self.capacity.num_blocks}")
        self.tensors.block_tables[number, slot.blocks : end] = torch.tensor(blocks, dtype=torch.int32)
        self.tensors.room[number] = end * self.capacity.block_tokens
        slot.blocks = end

    def _hold(self, slots: Iterable[int]) -> None:
        for number in slots:
            slot = self._slots.get(number)
            if slot is not None and slot.stage is Stage.DECODING:
                self._change(number, Stage.KNOWN)

    def _schedule(self, slots: array[int], rows: array[int]) -> None:
        self._scheduled = dict(zip(slots, rows, strict=True))
        # One that decodes anyway computes the same single row, as a chunk.
        self._hold(slots)

    def _set_rows(self, rows: array[int]) -> None:
        self.rows = rows
        self._decoding = None
        if len(set(rows)) < len(rows):
            for slot in {slot for slot in rows if rows.count(slot) > 1}:
                self._fail(slot, "the slot stands in the plan's rows twice")

    # ---- the step ----

    def _decodes(self) -> Choosing:
        """The slots of ``rows`` that decode; the same object as long as they are the same."""
        decoding = self._decoding or self._gather_decodes()
        short = self.tensors.computed[decoding.slots] >= self.tensors.room[decoding.slots]
        if short.any():
            for slot in decoding.slots[short].tolist():
                self._fail(slot, f"no block for position {int(self.tensors.computed[slot])}")
            decoding = self._gather_decodes()
        self._decoding = decoding
        return decoding

    def _gather_decodes(self) -> Choosing:
        slots = [slot for slot in self.rows if self._is_decoding(slot)]
        return Choosing.of(torch.tensor(slots, dtype=torch.int64), self.tensors)

    def _is_decoding(self, number: int) -> bool:
        slot = self._slots.get(number)
        return slot is not None and slot.stage is Stage.DECODING

    def _chunks(self) -> list[Chunk]:
        """The scheduled chunks in the order of the rows."""
        for slot in sorted(self._scheduled.keys() - set(self.rows)):
            self._fail(slot, "the slot is scheduled and not in the plan's rows")
        chunks: list[Chunk] = []
        for slot in self.rows:
            if slot in self._scheduled:
                with self._isolated(slot):
                    chunks += self._chunk(slot, self._scheduled[slot])
        return chunks

    def _chunk(self, number: int, rows: int) -> list[Chunk]:
        """The chunk, or none of an inert slot. A slot whose newest id is computed decodes from then on."""
        slot = self._live(number)
        if slot is None:
            return []
        start, admitted = int(self.tensors.computed[number]), slot.ids.numel()
        end, known = start + rows, max(admitted, start + 1)
        usable = slot.received if start < admitted else known
        if not start < end <= usable:
            raise SlotFault(f"{rows} rows from position {start} are scheduled, {usable} ids are known")
        if end > int(self.tensors.room[number]):
            raise SlotFault(f"no block for position {end - 1}")
        ids = slot.ids[start:end] if start < admitted else self.tensors.last_token[number : number + 1]
        if end == known:
            self._change(number, Stage.DECODING)
        return [Chunk(number, start, ids, end == known)]
