"""What a device computes in one step, launched kernel by kernel; :mod:`.graphs` records the decode steps of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.executor.layers.attention import LayerCache
from penstock.executor.layers.parallel import ALONE, Group
from penstock.executor.models.registry import Model
from penstock.executor.worker.device.attention import ChunkRows, DeviceStep
from penstock.executor.worker.device.few_rows import FewRowsStep
from penstock.executor.worker.device.prefill import Prefill
from penstock.executor.worker.slots import Capacity
from penstock.kernels.attention.decode_shapes import DecodeShape, Spread, decode_shape
from penstock.kernels.batch.gather import StepRows, fill_rows, gather_rows
from penstock.kernels.batch.state import ArenaLayout, BatchState
from penstock.kernels.batch.update import apply_words
from penstock.kernels.overlap import overlapped
from penstock.kernels.sampling.tail import TailOutput, sample_step


@dataclass(frozen=True, slots=True)
class MixedStep:
    """The device's side of a step that computes known ids: all tensors int32."""

    ids: Tensor
    """[rows of chunks and of padding]"""
    positions: Tensor
    slots: Tensor
    """The slot of each of these rows."""
    chunks: ChunkRows
    chosen: Tensor | None
    """[samples and padding]: of all rows, decodes first, that go on behind the last layer's attention; None: all"""
    sample_slots: Tensor
    """[samples]: whose next tokens are chosen from the first rows of these"""


class Program:
    """A model, its pages and the state of its slots."""

    def __init__(
        self,
        model: Model,
        pages: Sequence[LayerCache],
        capacity: Capacity,
        max_step_tokens: int,
        device: torch.device,
        prefill: Prefill | None = None,
        *,
        few_rows: bool = False,
        group: Group = ALONE,
    ) -> None:
        """``pages``: one cache a layer, of ``capacity.num_blocks`` blocks and one more, the scratch block.

        ``prefill``: what attends chunks; None: our own kernel. ``few_rows``: decode steps of few rows are
        computed by kernels of their own, if these take the model. ``group``: the ranks of ``model``, which all run the
        same steps.
        """
        self.model, self._pages, self.group = model, pages, group
        self._prefill = prefill or Prefill()
        self.row_size = model.hidden_size
        """Elements of a row between the layers."""
        self._block_tokens = capacity.block_tokens
        rows = capacity.max_sequences
        self.layout = ArenaLayout(rows, capacity.table_width, rows)
        self.state = BatchState.allocate(self.layout, device, scratch_block=capacity.num_blocks)
        self.max_rows = rows + max_step_tokens
        """Of a step, decodes and padding included."""
        self.rows = StepRows.allocate(self.max_rows, device)
        self.output = TailOutput.allocate(rows, capacity.vocab_size, device)
        self.logits = torch.empty(rows, capacity.vocab_size, dtype=pages[0].keys.dtype, device=device)
        weights = model.few_rows() if few_rows else None
        self.few_rows = None if weights is None else FewRowsStep(weights, pages, self.state, self.logits, rows)

    def apply(self, words: Tensor) -> None:
        """Change the state: int32 [2 n] of (offset, word) pairs."""
        if words.numel():
            apply_words(self.state.arena, words.view(-1, 2))

    def decode_shape(self, rows: int, spread: Spread) -> DecodeShape:
        """How attention of a decode step is cut."""
        keys = self._pages[0].keys
        return decode_shape(rows, keys.shape[2], keys.dtype, spread)

    def decode(self, rows: int, *, spread: Spread) -> None:
        """The logits of the first ``rows`` rows of the decode batch; running it twice changes nothing.

        ``spread``: how their lengths differ.
        """
        gather_rows(self.state, rows, self._block_tokens, self.rows)
        step = DeviceStep(self.state, self.rows, rows, spread=spread)
        with overlapped(self.row_size):
            hidden = self.model.forward(self.rows.ids[:rows], step, self._pages)
            self.model.logits(hidden, out=self.logits[:rows])

    def choose(self, rows: int, *, filtered: bool) -> None:
        """The next tokens of the first ``rows`` rows of the decode batch."""
        with overlapped(self.row_size):
            sample_step(self.logits[:rows], self.state.row_slots[:rows], self.state, self.output, filtered=filtered)
        self._agree()

    def mixed(self, decodes: int, step: MixedStep, *, spread: Spread) -> int:
        """The logits of ``decodes`` rows of the decode batch and of chunks that complete; returns how many."""
        if decodes:
            gather_rows(self.state, decodes, self._block_tokens, self.rows)
        fill_rows(self.state, self.rows, decodes, step.ids, step.positions, step.slots, self._block_tokens)
        count = decodes + step.ids.numel()
        chunks = step.chunks.over(self.state.block_tables, self.rows.slot_mapping[decodes:count])
        attention = DeviceStep(self.state, self.rows, decodes, self._prefill.bind(chunks, count - decodes), spread)
        samples = step.sample_slots.numel()
        with overlapped(self.row_size):
            hidden = self.model.forward(self.rows.ids[:count], attention, self._pages, step.chosen)
            if samples:
                self.model.logits(hidden, out=self.logits[: hidden.shape[0]])
        return samples

    def choose_mixed(self, step: MixedStep, *, filtered: bool) -> None:
        """The next tokens of the samples of a mixed step."""
        samples = step.sample_slots.numel()
        with overlapped(self.row_size):
            sample_step(self.logits[:samples], step.sample_slots, self.state, self.output, filtered=filtered)
        self._agree()

    def _agree(self) -> None:
        """What rank 0 chose holds in all ranks, whose logits may differ in their last bits."""
        self.group.broadcast(self.state.advanced)

    def shallow(self, layers: int = 2) -> Program:
        """The same with the last layers alone: with two any kernel of a step, in a fraction of its time.

        With three as much memory as with all: the first has none before it, in the last some rows may go no further.
        """
        part = copy.copy(self)
        part.model, part._pages = self.model.last_layers(layers), self._pages[-layers:]
        part.few_rows = None if self.few_rows is None else self.few_rows.shallow()
        return part

    def meet_prefill(self) -> None:
        """Launch whatever may attend chunks, once."""
        self._prefill.meet(self._pages[-1], self.state.block_tables, self.layout.slots)

    def forget(self) -> None:
        """No slot is live."""
        self.state.live.zero_()
        self.state.row_slots.fill_(self.layout.slots)
