"""Decode steps of few rows, whole: from the state of the slots to their next tokens, without the host.

Five kernels a layer, one before and two behind them (:mod:`penstock.kernels.gemv`). What they make of a step is kept
for a while in memory of its own, so that the next step need not wait until it has been fetched.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from penstock.executor.layers.attention import LayerCache
from penstock.executor.layers.few_rows import LayerWeights, StepWeights
from penstock.kernels.batch.state import BatchState
from penstock.kernels.gemv.attention import FewRows, SplitRoom, few_rows_attention
from penstock.kernels.gemv.begin import begin_step
from penstock.kernels.gemv.head import KEPT, FewTokens, head_and_choice
from penstock.kernels.gemv.product import gemv
from penstock.kernels.gemv.shapes import CONTEXTS, StepShape, context_class, most_rows
from penstock.kernels.gemv.tuned import step_shape
from penstock.kernels.overlap import overlapped


class FewRowsStep:
    """The steps of one model over its pages. Not thread-safe."""

    def __init__(
        self, weights: StepWeights, pages: Sequence[LayerCache], state: BatchState, logits: Tensor, rows: int
    ) -> None:
        """``logits`` [≥ rows, vocabulary]: where a step leaves them. ``rows``: the most that there can be."""
        self._weights, self._pages, self._state = weights, pages, state
        sizes, like = weights.sizes, weights.embedding
        self.most_rows = min(rows, most_rows(sizes))
        device, dtype = like.device, like.dtype

        def integers() -> Tensor:
            return torch.zeros(self.most_rows, dtype=torch.int32, device=device)

        def elements(width: int) -> Tensor:
            return torch.zeros(self.most_rows, width, dtype=dtype, device=device)

        self._rows = FewRows(integers(), integers(), elements(sizes.hidden))
        self._qkv = elements(sizes.weight("qkv")[0])
        self._inner = elements(sizes.inner)
        self._tokens = FewTokens.allocate(self.most_rows, logits)
        self._rooms: dict[int, SplitRoom] = {}
        self._begun = 0
        self.shapes: dict[tuple[int, int], StepShape] = {}
        """By rows and index of CONTEXTS, those that are used."""
        for count in range(1, self.most_rows + 1):
            for context in range(len(CONTEXTS)):
                shape = step_shape(sizes, count, context, device)
                if shape is not None:
                    self.shapes[count, context] = shape

    def shallow(self) -> FewRowsStep:
        """The same with the last two layers alone, its memory shared."""
        part = copy.copy(self)
        part._weights, part._pages = replace(self._weights, layers=self._weights.layers[-2:]), self._pages[-2:]
        return part

    def takes(self, rows: int) -> bool:
        """Whether a batch of so many rows can be computed like this."""
        return (rows, 0) in self.shapes

    def restart(self) -> None:
        """Forget the steps so far, which were nobody's; none may be under way."""
        self._tokens.steps.zero_()
        self._begun = 0

    def place(self) -> int:
        """Where in :meth:`kept` the next step leaves its tokens.

        To be called once for each step that is launched since the last :meth:`restart`.
        """
        place = self._begun % KEPT
        self._begun += 1
        return place

    def kept(self, place: int) -> Tensor:
        """int32 [2, most_rows]: tokens and statuses of a step, for as long as KEPT - 1 more steps have not begun."""
        return self._tokens.kept[place]

    def context(self, longest: int) -> int:
        """How a step is cut whose longest context is ``longest`` tokens: an index of CONTEXTS."""
        return context_class(longest)

    def run(self, rows: int, context: int) -> None:
        """Launch a step of the first ``rows`` rows of the decode batch; ``context``: see :meth:`context`."""
        self.compute(rows, self.shapes[rows, context])

    def compute(self, rows: int, shape: StepShape) -> None:
        """The same, cut like this."""
        weights = self._weights
        with overlapped(weights.sizes.hidden):
            begin_step(self._state, weights.embedding, self._rows, self._tokens.steps, rows)
            for layer, cache in zip(weights.layers, self._pages, strict=True):
                self._layer(layer, cache, rows, shape)
            head_and_choice(self._rows.stream, weights.head, weights.norm, self._state, self._tokens, shape.head, rows)

    def _layer(self, layer: LayerWeights, cache: LayerCache, rows: int, shape: StepShape) -> None:
        stream, qkv, inner = self._rows.stream[:rows], self._qkv[:rows], self._inner[:rows]
        gemv(stream, layer.qkv, qkv, shape.qkv, norm=layer.attention_norm, bias=layer.qkv_bias, late_release=True)
        attended = few_rows_attention(
            qkv,
            self._rows,
            self._weights.cos_sin,
            layer.head_norms,
            cache.keys,
            cache.values,
            self._state.block_tables,
            self._weights.scale,
            shape.attention,
            self._room(shape.attention.splits),
        )
        gemv(attended, layer.output, stream, shape.output, add=True)
        gemv(stream, layer.gate_up, inner, shape.gate_up, norm=layer.feed_forward_norm, gated=True)
        gemv(inner, layer.down, stream, shape.down, add=True)

    def _room(self, splits: int) -> SplitRoom:
        if splits not in self._rooms:
            sizes, like = self._weights.sizes, self._rows.stream
            self._rooms[splits] = SplitRoom.allocate(
                self.most_rows, sizes.heads, sizes.kv_heads, sizes.head_dim, splits, like.dtype, like.device
            )
        return self._rooms[splits]
