"""What a step brings to the device: one packed buffer, one copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.executor.worker.device.timeline import Mark, Timeline

Words = npt.NDArray[np.int32]

_ALIGNMENT: Final = 4
"""Sections begin at 16 bytes, so that a kernel is compiled for aligned pointers once and for all."""
_BUFFERS: Final = 4
"""Host buffers: more than plans can be in flight, so that waiting for one is rare."""


class Upload:
    """Packs int32 sections into pinned memory and copies them in the order of the device's work."""

    def __init__(self, timeline: Timeline, device: torch.device, capacity: int) -> None:
        """``capacity``: words that most steps need; larger ones make it grow."""
        self._timeline = timeline
        self._device = torch.empty(capacity, dtype=torch.int32, device=device)
        self._free: deque[tuple[Tensor, Mark | None]] = deque(
            (timeline.memory(capacity), None) for _ in range(_BUFFERS)
        )

    def send(self, sections: Sequence[Words]) -> list[Tensor]:
        """The sections on the device, int32 each; valid until what the next call's step launches."""
        starts, size = [], 0
        for section in sections:
            starts.append(size)
            size += -(-section.size // _ALIGNMENT) * _ALIGNMENT
        if not size:
            return [self._device[:0] for _ in sections]
        host = self._host(size)
        view = host.numpy()
        for start, section in zip(starts, sections, strict=True):
            view[start : start + section.size] = section.reshape(-1)
        self._timeline.upload(self._device[:size], host[:size])
        self._free.append((host, self._timeline.mark()))
        return [self._device[start : start + part.size] for start, part in zip(starts, sections, strict=True)]

    def _host(self, size: int) -> Tensor:
        """A host buffer that no copy reads any more, of at least ``size`` words."""
        host, used = self._free.popleft()
        if used is not None:
            used.wait()
        if self._device.numel() < size:
            self._device = torch.empty(2 * size, dtype=torch.int32, device=self._device.device)
        return host if host.numel() >= size else self._timeline.memory(2 * size)
