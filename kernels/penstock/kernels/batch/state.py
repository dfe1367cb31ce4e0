"""The state of all slots as views of one int32 arena.

Because all of it is one array of 32-bit words, a plan's differences are a list of (offset, word) pairs whatever they
mean, and one small kernel applies them: :mod:`penstock.kernels.batch.update`. float32 columns hold their bit patterns.

The last slot, number ``slots``, belongs to nobody: rows that pad a batch name it. It is never live, and its block table
names the *scratch block*, where keys and values go that nobody will read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STOP_IDS = 64
"""Stop ids of one slot."""

NOT_LIVE, LIVE = 0, 1

_WORDS = (
    "live",
    "last_token",
    "computed",
    "outputs",
    "max_tokens",
    "min_tokens",
    "top_k",
    "sample_index",
    "stop_count",
)
_FLOATS = ("temperature", "top_p", "min_p")
_ADVANCED = 4
"""The first of these words are those that a step changes by itself."""


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """Where everything stands in the arena, in words."""

    slots: int
    """Slots of sequences; there is one more."""
    table_width: int
    """Blocks of the longest sequence."""
    max_rows: int
    """Most rows of a decode batch."""

    def offset(self, column: str) -> int:
        """Offset of a column of one word a slot: slot ``s`` has word ``offset + s``."""
        return (*_WORDS, *_FLOATS).index(column) * (self.slots + 1)

    @property
    def seeds(self) -> int:
        """Offset of the seeds: two words a slot, the low one first."""
        return (len(_WORDS) + len(_FLOATS)) * (self.slots + 1)

    @property
    def stop_ids(self) -> int:
        """Offset of the stop ids: MAX_STOP_IDS words a slot, of which ``stop_count`` count."""
        return self.seeds + 2 * (self.slots + 1)

    @property
    def block_tables(self) -> int:
        """Offset of the block tables: ``table_width`` words a slot."""
        return self.stop_ids + MAX_STOP_IDS * (self.slots + 1)

    @property
    def row_slots(self) -> int:
        """Offset of the decode batch: the slot of each row."""
        return self.block_tables + self.table_width * (self.slots + 1)

    @property
    def words(self) -> int:
        """Size of the arena."""
        return self.row_slots + self.max_rows


@dataclass(frozen=True, slots=True)
class BatchState:
    """The arena and its columns, all of them views: int32 [slots + 1] where nothing else is said."""

    layout: ArenaLayout
    arena: Tensor
    """int32 [words]"""
    live: Tensor
    """LIVE: the slot's rows count. A sequence that has ended or failed is NOT_LIVE until it is released."""
    last_token: Tensor
    """The newest known token of a slot that decodes: the one that its next row computes."""
    computed: Tensor
    """Tokens whose keys and values are in the pages: the position of the slot's next row."""
    outputs: Tensor
    """Output tokens made so far."""
    max_tokens: Tensor
    min_tokens: Tensor
    top_k: Tensor
    """0: all."""
    sample_index: Tensor
    """Read as unsigned."""
    stop_count: Tensor
    temperature: Tensor
    """float32; 0 is greedy."""
    top_p: Tensor
    """float32."""
    min_p: Tensor
    """float32."""
    seeds: Tensor
    """int32 [slots + 1, 2]: low word, high word, read as unsigned."""
    stop_ids: Tensor
    """int32 [slots + 1, MAX_STOP_IDS]"""
    block_tables: Tensor
    """int32 [slots + 1, table_width]"""
    row_slots: Tensor
    """int32 [max_rows]"""

    @property
    def advanced(self) -> Tensor:
        """All that a step changes by itself, contiguous: ``live``, ``last_token``, ``computed`` and ``outputs``."""
        return self.arena[: _ADVANCED * (self.layout.slots + 1)]

    @classmethod
    def allocate(cls, layout: ArenaLayout, device: torch.device, scratch_block: int) -> BatchState:
        """Nothing is live; the extra slot's table names ``scratch_block`` throughout."""
        arena = torch.zeros(layout.words, dtype=torch.int32, device=device)
        count = layout.slots + 1

        def view(offset: int, width: int) -> Tensor:
            return arena[offset : offset + count * width].view(count, width)

        columns = {name: view(layout.offset(name), 1).squeeze(1) for name in _WORDS}
        columns |= {name: view(layout.offset(name), 1).squeeze(1).view(torch.float32) for name in _FLOATS}
        state = cls(
            layout=layout,
            arena=arena,
            seeds=view(layout.seeds, 2),
            stop_ids=view(layout.stop_ids, MAX_STOP_IDS),
            block_tables=view(layout.block_tables, layout.table_width),
            row_slots=arena[layout.row_slots :],
            **columns,
        )
        state.block_tables[layout.slots] = scratch_block
        state.row_slots.fill_(layout.slots)
        return state
