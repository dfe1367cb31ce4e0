"""Next tokens from logits, for the rows of one step."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.executor.worker.step_input import Choosing
from penstock.kernels.sampling.reference import sample


def choose_tokens(logits: Tensor, choosing: Choosing, outputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Choose one token a row.

    ``logits`` float32 [rows, vocabulary] may be changed; ``outputs`` int64 [rows]: tokens made so far; ``positions``
    int64 [rows]: where the chosen token will stand. Returns the tokens, int64 [rows], and which rows are sound,
    bool [rows]: a row with a logit that is not finite has no meaningful token.
    """
    sound = torch.isfinite(logits.sum(dim=-1))
    if choosing.has_min_tokens:
        _forbid_stopping(logits, choosing, outputs)
    return sample(logits, choosing.sampling, positions), sound


def _forbid_stopping(logits: Tensor, choosing: Choosing, outputs: Tensor) -> None:
    """Minus infinity for the stop ids of rows that have not made their min_tokens."""
    early = outputs < choosing.min_tokens
    forbidden = early[:, None] & (choosing.stop_ids >= 0) & (choosing.stop_ids < logits.shape[1])
    row, entry = forbidden.nonzero(as_tuple=True)
    logits[row, choosing.stop_ids[row, entry]] = float("-inf")
