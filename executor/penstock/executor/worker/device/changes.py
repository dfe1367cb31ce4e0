"""What a plan changes on the device, as words of the arena (:mod:`penstock.kernels.batch.state`)."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from penstock.executor.step import Admission, unpack_u32
from penstock.kernels.batch.state import LIVE, MAX_STOP_IDS, NOT_LIVE, ArenaLayout

Words = npt.NDArray[np.int32]

_LARGEST = 2**31 - 1


class Changes:
    """Gathers the words that one plan changes; of a word that is set twice the later value counts."""

    def __init__(self, layout: ArenaLayout) -> None:
        """Nothing changes yet."""
        self._layout = layout
        self._words: dict[int, int] = {}

    def __len__(self) -> int:
        """Words that change."""
        return len(self._words)

    def take(self) -> Words:
        """The words, int32 [n, 2] of (offset, word), and begin anew."""
        taken = np.fromiter(
            (part for pair in self._words.items() for part in pair), np.int64, 2 * len(self._words)
        ).astype(np.uint32)
        self._words.clear()
        return taken.view(np.int32).reshape(-1, 2)

    def set_column(self, column: str, slot: int, value: int) -> None:
        """A word of a slot; larger values than fit are cut to the largest. Raises OverflowError for negative ones."""
        if value < 0:
            raise OverflowError(f"{column} {value} overflows")
        self._words[self._layout.offset(column) + slot] = min(value, _LARGEST)

    def set_float(self, column: str, slot: int, value: float) -> None:
        """A float32 of a slot. Raises OverflowError for a number that is none."""
        try:
            packed = struct.pack("<f", value)
        except OverflowError:
            raise OverflowError(f"{column} {value} cannot be a float32 without overflow") from None
        (self._words[self._layout.offset(column) + slot],) = struct.unpack("<I", packed)

    def set_live(self, slot: int, live: bool) -> None:
        """Whether the slot's rows count."""
        self.set_column("live", slot, LIVE if live else NOT_LIVE)

    def set_row(self, row: int, slot: int) -> None:
        """The slot of a row of the decode batch."""
        self._words[self._layout.row_slots + row] = slot

    def append_blocks(self, slot: int, first: int, blocks: list[int]) -> None:
        """Entries ``first``… of a slot's block table."""
        start = self._layout.block_tables + slot * self._layout.table_width + first
        for offset, block in enumerate(blocks, start):
            self._words[offset] = block

    def admit(self, admission: Admission) -> None:
        """All that the device knows of a sequence of which nothing is computed."""
        slot, sampling, stopping = admission.slot, admission.sampling, admission.stopping
        self.set_live(slot, False)
        self.set_column("computed", slot, 0)
        self.set_column("outputs", slot, admission.total_ids - admission.prompt_ids)
        self.set_column("max_tokens", slot, stopping.max_tokens)
        self.set_column("min_tokens", slot, stopping.min_tokens)
        self.set_column("top_k", slot, sampling.top_k)
        self.set_float("temperature", slot, sampling.temperature)
        self.set_float("top_p", slot, sampling.top_p)
        self.set_float("min_p", slot, sampling.min_p)
        self._words[self._layout.offset("sample_index") + slot] = admission.sample_index & 0xFFFFFFFF
        self._words[self._layout.seeds + 2 * slot] = admission.seed & 0xFFFFFFFF
        self._words[self._layout.seeds + 2 * slot + 1] = admission.seed >> 32 & 0xFFFFFFFF
        self._admit_stop_ids(slot, unpack_u32(stopping.stop_ids).tolist())

    def _admit_stop_ids(self, slot: int, stop_ids: list[int]) -> None:
        self.set_column("stop_count", slot, len(stop_ids))
        for offset, token in enumerate(stop_ids, self._layout.stop_ids + slot * MAX_STOP_IDS):
            self._words[offset] = token
