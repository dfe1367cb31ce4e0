"""What ``transformers`` makes of a checkpoint: the answers that ours are compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@functools.cache
def load_reference(folder: Path) -> Any:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def greedy_tokens(folder: Path, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The greedy continuation; it ends early only at an end-of-sequence id of the checkpoint."""
    ids = torch.tensor([list(prompt)])
    mask = torch.ones_like(ids)
    out = load_reference(folder).generate(
        ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in out[0, len(prompt) :]]
