"""Decode steps as CUDA graphs: one launch for the layers, one for the choice of tokens.

A graph computes a fixed number of rows; a batch is padded up to the next size with rows of the slot that is nobody's,
which cost little more than their share of the matrix products. Without graphs it is padded all the same, so that both
compute the same. All graphs share one pool of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from penstock.executor.worker.device.capture import Captured, Recorder
from penstock.executor.worker.device.program import Program
from penstock.executor.worker.device.sizes import graph_size, graph_sizes
from penstock.kernels.attention.decode_shapes import DecodeShape, Spread


class DecodeGraphs:
    """The decode steps of a program. Until they are captured every step is launched kernel by kernel."""

    def __init__(self, program: Program) -> None:
        """Nothing is captured."""
        self._program = program
        self._forward: dict[tuple[int, DecodeShape], Captured] = {}
        self._tail: dict[tuple[int, bool], Captured] = {}
        self._few: dict[tuple[int, int], Captured] = {}
        self._recorder: Recorder | None = None

    def capture(self, recorder: Recorder, on_size: Callable[[], None]) -> None:
        """Capture all sizes, the largest first so that the smaller ones share its memory.

        ``on_size`` is called behind each. No slot may be live.
        """
        self._recorder = recorder
        for size in reversed(graph_sizes(self._program.layout.slots)):
            for spread in (Spread.EVEN, Spread.UNEVEN, Spread.MIXED):
                self._forward_of(size, spread)
            for filtered in (False, True):
                choose = partial(self._program.choose, size, filtered=filtered)
                self._tail[size, filtered] = recorder.captured(choose)
            on_size()
        self._capture_few(recorder)

    def decode(self, rows: int, *, spread: Spread) -> None:
        """The logits of the decode batch of ``rows`` rows; see :meth:`Program.decode`.

        A size whose lengths are spread in a way that is rare is captured when it is first met.
        """
        size = self._size_of(rows)
        if self._recorder is None:
            self._program.decode(size, spread=spread)
        else:
            self._forward_of(size, spread).replay()

    def _forward_of(self, size: int, spread: Spread) -> Captured:
        """The graph; spreads for which attention is cut alike share one."""
        key = size, self._program.decode_shape(size, spread)
        if key not in self._forward:
            assert self._recorder is not None
            self._forward[key] = self._recorder.captured(partial(self._program.decode, size, spread=spread))
        return self._forward[key]

    def choose(self, rows: int, *, filtered: bool) -> None:
        """Its next tokens."""
        size = self._size_of(rows)
        if self._recorder is None:
            self._program.choose(size, filtered=filtered)
        else:
            self._tail[size, filtered].replay()

    def takes_few(self, rows: int) -> bool:
        """Whether :meth:`few` computes a decode batch of ``rows`` rows."""
        few = self._program.few_rows
        return few is not None and few.takes(rows)

    def few(self, rows: int, *, longest: int) -> Tensor:
        """A whole step of few rows, unfiltered, of contexts up to ``longest`` tokens; returns where its tokens will be.

        int32 [2, ≥ rows], tokens and statuses: see :meth:`FewRowsStep.kept`.
        """
        few = self._program.few_rows
        assert few is not None
        context = few.context(longest)
        if self._recorder is None:
            few.run(rows, context)
        else:
            self._few[rows, context].replay()
        return few.kept(few.place())

    def _capture_few(self, recorder: Recorder) -> None:
        few = self._program.few_rows
        if few is None:
            return
        for rows, context in few.shapes:
            self._few[rows, context] = recorder.captured(partial(few.run, rows, context))

    def _size_of(self, rows: int) -> int:
        return graph_size(rows, self._program.layout.slots)
