"""What the worker keeps of each slot: a small object on the host, and one row of every device tensor."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.executor.step import MAX_STOP_IDS, Admission, Sampling, unpack_u32
from penstock.kernels.sampling.reference import SamplingRows

NO_TOKEN = -1
MANY = 2**40
"""More tokens than any limit: what a larger number is cut to."""


class SlotFault(ValueError):
    """A plan asks of a slot what cannot be done; the slot fails alone. The message is one line."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The sizes that a worker was started with."""

    max_sequences: int
    max_model_tokens: int
    block_tokens: int
    num_blocks: int
    vocab_size: int

    @property
    def table_width(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_tokens // self.block_tokens)


class Stage(enum.Enum):
    """Where a slot stands."""

    KNOWN = enum.auto()
    """Takes part only in plans that schedule it: its known ids are computed in chunks, or it is held."""
    DECODING = enum.auto()
    """Takes part in every plan, a row at a time."""
    INERT = enum.auto()
    """Stopped or failed: nothing happens until it is released."""


@dataclass(slots=True)
class Slot:
    """The host's side of an occupied slot."""

    ids: Tensor
    """int64 [total known ids at admission]"""
    received: int = 0
    fragments: int = 0
    blocks: int = 0
    stage: Stage = Stage.KNOWN

    @classmethod
    def inert(cls) -> Slot:
        """A slot in which nothing happens."""
        return cls(torch.empty(0, dtype=torch.int64), stage=Stage.INERT)

    @classmethod
    def admit(cls, admission: Admission, capacity: Capacity) -> Slot:
        """Check and take the first known ids. Raises :class:`SlotFault`."""
        if not 1 <= admission.prompt_ids <= admission.total_ids <= capacity.max_model_tokens:
            counts = f"{admission.prompt_ids} prompt ids of {admission.total_ids} known ids"
            raise SlotFault(f"{counts} do not fit {capacity.max_model_tokens} tokens")
        slot = cls(torch.empty(admission.total_ids, dtype=torch.int64))
        slot.receive(admission.ids, capacity.vocab_size)
        return slot

    def receive(self, packed: bytes, vocab_size: int) -> None:
        """Take the next fragment of known ids, u32."""
        ids = torch.from_numpy(np.frombuffer(packed, "<u4").astype(np.int64))
        if self.received + ids.numel() > self.ids.numel():
            raise SlotFault(f"more than the {self.ids.numel()} known ids that were announced")
        if ids.numel() and int(ids.max()) >= vocab_size:
            raise SlotFault(f"id {int(ids.max())} is outside the vocabulary of {vocab_size}")
        self.ids[self.received : self.received + ids.numel()] = ids
        self.received += ids.numel()
        self.fragments += 1


@dataclass(slots=True)
class SlotTensors:
    """One row per slot; a decode step reads and writes nothing else."""

    last_token: Tensor
    """int64: the newest known token of a slot whose known ids of the admission are all computed"""
    computed: Tensor
    """int64: tokens whose keys and values are in the pages"""
    room: Tensor
    """int64: tokens that the appended blocks hold"""
    block_tables: Tensor
    """int32 [slots, table_width]"""
    outputs: Tensor
    """int64: output tokens made, before an admission too"""
    max_tokens: Tensor
    min_tokens: Tensor
    stop_ids: Tensor
    """int64 [slots, MAX_STOP_IDS], filled up with NO_TOKEN"""
    sampling: SamplingRows

    @classmethod
    def allocate(cls, capacity: Capacity) -> SlotTensors:
        """All zero."""
        slots = capacity.max_sequences

        def column() -> Tensor:
            return torch.zeros(slots, dtype=torch.int64)

        return cls(
            last_token=column(),
            computed=column(),
            room=column(),
            block_tables=torch.zeros(slots, capacity.table_width, dtype=torch.int32),
            outputs=column(),
            max_tokens=column(),
            min_tokens=column(),
            stop_ids=torch.full((slots, MAX_STOP_IDS), NO_TOKEN, dtype=torch.int64),
            sampling=SamplingRows(
                temperature=torch.zeros(slots),
                top_k=column(),
                top_p=torch.ones(slots),
                seed=column(),
                sample_index=column(),
                min_p=torch.zeros(slots),
            ),
        )

    def admit(self, admission: Admission) -> None:
        """Set the slot's rows for a sequence of which nothing is computed. Raises :class:`SlotFault`."""
        slot, stopping = admission.slot, admission.stopping
        refuse_unsupported(admission)
        stop_ids = unpack_u32(stopping.stop_ids)
        if len(stop_ids) > MAX_STOP_IDS:
            raise SlotFault(f"{len(stop_ids)} stop ids, at most {MAX_STOP_IDS} are possible")
        self.computed[slot] = 0
        self.room[slot] = 0
        self.outputs[slot] = admission.total_ids - admission.prompt_ids
        self.max_tokens[slot] = min(stopping.max_tokens, MANY)
        self.min_tokens[slot] = min(stopping.min_tokens, MANY)
        self.stop_ids[slot] = NO_TOKEN
        self.stop_ids[slot, : len(stop_ids)] = torch.tensor(list(stop_ids), dtype=torch.int64)
        self._admit_sampling(admission)

    def _admit_sampling(self, admission: Admission) -> None:
        slot, rows = admission.slot, self.sampling
        rows.temperature[slot] = admission.sampling.temperature
        rows.top_k[slot] = min(admission.sampling.top_k, MANY)
        rows.top_p[slot] = admission.sampling.top_p
        if rows.min_p is not None:
            rows.min_p[slot] = admission.sampling.min_p
        rows.seed[slot] = signed_64(admission.seed)
        rows.sample_index[slot] = admission.sample_index & 0xFFFFFFFF


SUPPORTED = frozenset({"temperature", "top_p", "top_k", "min_p"})
DEFAULTS = Sampling()


def refuse_unsupported(admission: Admission) -> None:
    """Raise :class:`SlotFault` for anything set that this worker would not obey."""
    for name in Sampling.__struct_fields__:
        if name not in SUPPORTED and getattr(admission.sampling, name) != getattr(DEFAULTS, name):
            raise SlotFault(f"sampling parameter {name} is not supported by this executor")
    if admission.adapter:
        raise SlotFault("adapters are not supported by this executor")


def signed_64(value: int) -> int:
    """The 64 bits of ``value`` as the signed integer that a tensor can hold."""
    bits = value & (2**64 - 1)
    return bits - 2**64 if bits >= 2**63 else bits
