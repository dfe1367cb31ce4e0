"""Attention of chunks by flash-attn (Dao et al. 2022, 2023; Shah et al. 2024), where it is installed. 16-bit only.

flash-attn-4 (``flash_attn.cute``, ``pip install 'penstock[flash]'``) takes pages of any size on Hopper and Blackwell;
flash-attn 2 (``flash_attn``) pages of multiples of 256 tokens, from Ampere on. Importing the first takes about 6 s, and
it compiles for 2 to 4 s when it is first called with a dtype, head size or way to find keys that it has not had: that
belongs to the start (``ChunkBackend.met_rows``).

What flash-attn-4 compiles anew for, beside dtype and head size (read from 4.0.0b36): query heads for each key head;
pages as large as its tile of keys, or any others; more than 256 sequences (MOST_SEQUENCES); and, if it is told the most
queries of a sequence, whether they fit one tile. It is not told, and on Hopper has no other use for it, so that no
number of the host can be wrong when a CUDA graph is replayed. flash-attn 2 is told ``Chunks.longest`` and what a row
of the table can hold: bounds that must be true at each replay.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from penstock.kernels.attention.chunks import AttendChunks, AttentionShape, Chunks
from penstock.kernels.attention.tails import clear_tails

MOST_SEQUENCES: Final = 256
"""Of one step; for more flash-attn-4 has another kernel, which is not compiled at the start."""
LONE_ROWS: Final = 256
"""The fewest rows of a fresh prompt without pages: with few flash-attn-4 has another kernel."""
TILE_OF_KEYS: Final = 128
"""Pages of so many tokens are loaded whole by flash-attn-4, with what lies behind the end of the sequence."""
PAGES_OF_2: Final = 256
"""flash-attn 2 takes pages of multiples of so many tokens."""
NOT_INSTALLED: Final = "is not installed (pip install 'penstock[flash]')"
_NEEDED: Final = ("cu_seqlens_q", "seqused_k", "page_table", "softmax_scale", "causal", "out")
"""Arguments of flash-attn-4's forward pass that are used here."""
_ITS_PARTS: Final = "flash_attn|cutlass|quack"
_BROKEN: Final = (ImportError, AttributeError, OSError, RuntimeError)
"""What a package may raise when it is imported with another version of what it stands on."""


class FlashUnavailable(RuntimeError):
    """Why flash-attn cannot serve, in one line."""


class FlashLibrary(Protocol):
    """One generation of it."""

    @property
    def name(self) -> str:
        """With its number."""
        ...

    def bind(self, chunks: Chunks) -> AttendChunks:
        """Over pages. Raises ValueError for more than MOST_SEQUENCES."""
        ...

    def alone(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """See :class:`penstock.kernels.attention.chunks.LoneAttention`."""
        ...


@dataclass(frozen=True, slots=True)
class FlashPages:
    """See :class:`penstock.kernels.attention.chunks.ChunkBackend`."""

    library: FlashLibrary
    lone_only: bool = False
    met_rows: tuple[int, ...] = (16,)

    @property
    def name(self) -> str:
        """That of the library."""
        return self.library.name

    def bind(self, chunks: Chunks) -> AttendChunks:
        """To one step. Raises ValueError for more than MOST_SEQUENCES sequences."""
        if chunks.slots.numel() > MOST_SEQUENCES:
            raise ValueError(f"{chunks.slots.numel()} chunks, {self.name} is compiled for at most {MOST_SEQUENCES}")
        return self.library.bind(chunks)


def flash_library(shape: AttentionShape) -> FlashLibrary:
    """The newest one that serves ``shape``. Imports it, which takes seconds. Raises FlashUnavailable."""
    general = _general_refusal(shape)
    if general is not None:
        raise FlashUnavailable(f"flash-attn {general}")
    refusals = []
    for name, refusal, load in (("flash-attn-4", _refusal_of_4, _load_4), ("flash-attn 2", _refusal_of_2, _load_2)):
        reason = refusal(shape)
        if reason is not None:
            refusals.append(f"{name} {reason}")
            continue
        try:
            return load()
        except FlashUnavailable as failure:
            refusals.append(str(failure))
    raise FlashUnavailable("; ".join(refusals))


def _general_refusal(shape: AttentionShape) -> str | None:
    if shape.device.type != "cuda":
        return f"needs an NVIDIA GPU, the device is {shape.device}"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, the model in {str(shape.dtype).removeprefix('torch.')}"
    if shape.head_dim % 8 or not 8 <= shape.head_dim <= 256:
        return f"takes heads of multiples of 8 up to 256, the model's have {shape.head_dim}"
    return None


def _refusal_of_4(shape: AttentionShape) -> str | None:
    major, minor = torch.cuda.get_device_capability(shape.device)
    if major not in (9, 10, 11):
        return f"has no pages for compute capability {major}.{minor}"
    if major != 9 and shape.head_dim > 128 and shape.head_dim != 256:
        return f"takes heads of at most 128, or of 256, on this GPU, the model's have {shape.head_dim}"
    return None if _is_installed("flash_attn.cute") else NOT_INSTALLED


def _refusal_of_2(shape: AttentionShape) -> str | None:
    major, minor = torch.cuda.get_device_capability(shape.device)
    if major < 8:
        return f"has no kernel for compute capability {major}.{minor}"
    if shape.block_tokens % PAGES_OF_2:
        return f"takes pages of multiples of {PAGES_OF_2} tokens, block_tokens is {shape.block_tokens}"
    return None if _is_installed("flash_attn.flash_attn_interface") else NOT_INSTALLED


def _is_installed(module: str) -> bool:
    """Imports no more than the package around it; if that fails, importing the module will say how."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
    except _BROKEN:
        return True


# ---- flash-attn-4 ----


@functools.cache
def _load_4() -> FlashLibrary:
    # What it says of its own code to its own authors, again with every kernel.
    warnings.filterwarnings("ignore", module=_ITS_PARTS)
    _keep_compiled()
    try:
        from flash_attn.cute.interface import _flash_attn_fwd as forward
    except _BROKEN as error:
        raise FlashUnavailable(f"flash-attn-4 cannot be imported: {' '.join(str(error).split())}") from error
    return Flash4(forward)


def _keep_compiled() -> None:
    """Let it keep what it has compiled, if nobody has said otherwise: in a folder that only this user can write."""
    folder = Path.home() / ".cache" / "penstock" / "flash_attn"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


class Flash4:
    """flash-attn-4. Of its forward pass the inner function is used: the public one has no ``out``."""

    name: str = "flash-attn-4"

    def __init__(self, forward: Callable[..., Any]) -> None:
        """``forward``: its ``_flash_attn_fwd``. Raises FlashUnavailable if that of this version is another one."""
        missing = [name for name in _NEEDED if name not in inspect.signature(forward).parameters]
        if missing:
            raise FlashUnavailable(f"flash-attn-4 of this version does not know {', '.join(missing)}")
        self._forward = forward

    def bind(self, chunks: Chunks) -> AttendChunks:
        """See :class:`FlashLibrary`."""
        tables = chunks.block_tables.index_select(0, chunks.slots)

        def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
            if keys.shape[1] == TILE_OF_KEYS:
                clear_tails(values, tables, chunks.contexts)
            self._forward(
                query, keys, values, cu_seqlens_q=chunks.query_start, seqused_k=chunks.contexts, page_table=tables,
                softmax_scale=scale, causal=True, out=out,
            )  # fmt: skip

        return attend

    def alone(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """See :class:`FlashLibrary`."""
        self._forward(query[None], keys[None], values[None], softmax_scale=scale, causal=True, out=out[None])


# ---- flash-attn 2 ----


@functools.cache
def _load_2() -> FlashLibrary:
    try:
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
    except _BROKEN as error:
        raise FlashUnavailable(f"flash-attn 2 cannot be imported: {' '.join(str(error).split())}") from error
    return Flash2(flash_attn_varlen_func)


class Flash2:
    """flash-attn 2, from 2.6 on; its results are copied, for it has no ``out``."""

    name: str = "flash-attn 2"

    def __init__(self, varlen: Callable[..., Any]) -> None:
        """``varlen``: its ``flash_attn_varlen_func``. Raises FlashUnavailable if that knows no pages."""
        if "block_table" not in inspect.signature(varlen).parameters:
            raise FlashUnavailable("flash-attn 2 of this version does not know block_table")
        self._varlen = varlen

    def bind(self, chunks: Chunks) -> AttendChunks:
        """See :class:`FlashLibrary`."""
        tables = chunks.block_tables.index_select(0, chunks.slots)
        key_start = torch.nn.functional.pad(chunks.contexts.cumsum(0, dtype=torch.int32), (1, 0))

        def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
            most = tables.shape[1] * keys.shape[1]
            made = self._varlen(
                query, keys, values, chunks.query_start, key_start, chunks.longest, most,
                softmax_scale=scale, causal=True, block_table=tables,
            )  # fmt: skip
            out.copy_(made)

        return attend

    def alone(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """See :class:`FlashLibrary`."""
        rows = query.shape[0]
        start = torch.arange(0, rows + 1, rows, dtype=torch.int32, device=query.device)
        out.copy_(self._varlen(query, keys, values, start, start, rows, rows, softmax_scale=scale, causal=True))
