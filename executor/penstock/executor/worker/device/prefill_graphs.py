"""Short prompts as CUDA graphs: steps of up to 512 known ids that nothing decodes beside.

Launched kernel by kernel such a step waits for the host: some 300 launches take longer than their work. A graph
computes a fixed number of rows and of sequences; what is missing is padded with rows of the slot that is nobody's and
with sequences of no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from penstock.executor.worker.device.attention import ChunkRows
from penstock.executor.worker.device.capture import Captured, Recorder
from penstock.executor.worker.device.mirror import Chunk, Step
from penstock.executor.worker.device.program import MixedStep, Program
from penstock.executor.worker.device.upload import Words
from penstock.kernels.attention.decode_shapes import Spread

SIZES: Final = (16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
"""Rows: few, for each takes memory and time at the start."""
SEQUENCES: Final = 4
"""Most chunks of such a step."""
_COLUMNS: Final = {
    "slots": SEQUENCES, "starts": SEQUENCES + 1, "contexts": SEQUENCES, "chosen": SEQUENCES, "owners": SEQUENCES,
}  # fmt: skip
"""Of each chunk slot, first row and context, of each sample row and slot: words."""
_ROWS: Final = ("ids", "positions", "row_slots")
"""Behind these: a word a row of each."""
_ALIGNMENT: Final = 4
"""Each begins at 16 bytes, so that kernels are compiled for aligned pointers."""


class PrefillGraphs:
    """Steps of prompts alone. Until they are captured none is taken."""

    def __init__(self, program: Program) -> None:
        """Nothing is captured."""
        self._program = program
        words = self._fields(SIZES[-1])[_ROWS[-1]].stop
        self._words = torch.zeros(words, dtype=torch.int32, device=program.state.arena.device)
        self._forward: dict[int, Captured] = {}
        self._tail: dict[bool, Captured] = {}

    @staticmethod
    def sizes(max_rows: int, slots: int) -> list[int]:
        """Those that are captured where steps have at most ``max_rows`` rows and there are so many slots."""
        return [size for size in SIZES if size <= max_rows] if slots >= SEQUENCES else []

    def capture(self, recorder: Recorder, on_size: Callable[[], None]) -> None:
        """Capture all sizes, the largest first. ``on_size`` is called behind each. No slot may be live."""
        sizes = self.sizes(self._program.max_rows, self._program.layout.slots)
        if not sizes:
            return
        for size in reversed(sizes):
            packed = torch.from_numpy(self.pack([], size))
            self._words[: packed.numel()].copy_(packed)
            self._forward[size] = recorder.captured(partial(self._compute, size))
            on_size()
        for filtered in (False, True):
            choose = partial(self._program.choose_mixed, self._step(sizes[0]), filtered=filtered)
            self._tail[filtered] = recorder.captured(choose)

    def size_of(self, step: Step) -> int | None:
        """The size of the graph that computes it; None: none does."""
        if len(step.decodes) or len(step.chunks) > SEQUENCES or len(step.samples) > SEQUENCES:
            return None
        rows = sum(chunk.ids.size for chunk in step.chunks)
        return next((size for size in sorted(self._forward) if size >= rows), None)

    def pack(self, chunks: Sequence[Chunk], size: int) -> Words:
        """What a graph of that size reads: int32, as :meth:`_step` takes it apart."""
        nobody = self._program.layout.slots
        fields = self._fields(size)
        words = np.zeros(fields[_ROWS[-1]].stop, np.int32)
        slots, starts, contexts, chosen, owners = (words[fields[name]] for name in _COLUMNS)
        ids, positions, row_slots = (words[fields[name]] for name in _ROWS)
        slots[:], owners[:], row_slots[:] = nobody, nobody, nobody
        row = sample = 0
        for place, chunk in enumerate(chunks):
            end = row + chunk.ids.size
            ids[row:end] = chunk.ids
            positions[row:end] = np.arange(chunk.start, chunk.start + chunk.ids.size)
            row_slots[row:end] = chunk.slot
            slots[place], starts[place], contexts[place] = chunk.slot, row, chunk.start + chunk.ids.size
            if chunk.completes:
                chosen[sample], owners[sample] = end - 1, chunk.slot
                sample += 1
            row = end
        starts[len(chunks) :] = row
        return words

    def compute(self, size: int, words: Tensor) -> None:
        """The logits of a step that :meth:`pack` has packed, ``words`` on the device."""
        self._words[: words.numel()].copy_(words)
        self._forward[size].replay()

    def choose(self, *, filtered: bool) -> None:
        """The next tokens of its samples, in the order of the chunks."""
        self._tail[filtered].replay()

    def _compute(self, size: int) -> None:
        self._program.mixed(0, self._step(size), spread=Spread.MIXED)

    def _step(self, size: int) -> MixedStep:
        fields = {name: self._words[place] for name, place in self._fields(size).items()}
        return MixedStep(
            ids=fields["ids"],
            positions=fields["positions"],
            slots=fields["row_slots"],
            chunks=ChunkRows(fields["slots"], fields["starts"], fields["contexts"], size),
            chosen=fields["chosen"],
            sample_slots=fields["owners"],
        )

    @staticmethod
    def _fields(size: int) -> dict[str, slice]:
        """Where each stands, each at a multiple of 16 bytes."""
        found, at = {}, 0
        for name, count in {**_COLUMNS, **dict.fromkeys(_ROWS, size)}.items():
            found[name] = slice(at, at + count)
            at += -(-count // _ALIGNMENT) * _ALIGNMENT
        return found
