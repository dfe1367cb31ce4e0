"""Kernels that begin before the one in front of them is done compute what they compute one by one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from penstock.executor.worker.device import start
from penstock.kernels import overlap
from penstock.kernels.gemv.shapes import MOST_ROWS
from penstock.local import LLM, SamplingParams
from support.tiny_llama import TinyLlama, build_tiny_llama


def tokens_of(folder: Path, rows: int, overlapping: bool, patch: pytest.MonkeyPatch) -> list[list[int]]:
    """What ``rows`` sequences of different lengths make."""
    patch.setattr(overlap, "overlap_pays", lambda rows, size: overlapping)
    patch.setattr(start, "TUNE_SECONDS", 0.0)  # of near-equal algorithms either may win, and rounds its own way
    source = random.Random(rows)
    prompts = [[source.randrange(5, 90) for _ in range(source.randrange(1, 90))] for _ in range(rows)]
    settings = {"device": "cuda", "dtype": "bfloat16", "executor": "uniproc"}
    with LLM(folder, **settings, max_sequences=rows, max_step_tokens=8192) as llm:
        outputs = llm.generate(
            prompts,
            SamplingParams(temperature=1.0, max_tokens=256 if rows <= MOST_ROWS else 80, ignore_eos=True),
            progress=False,
        )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 48])
def test_tokens_are_the_same(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TinyLlama(
        model_type="qwen3", hidden_size=512, intermediate_size=1024, num_hidden_layers=4, eos_token_id=None
    )
    folder = build_tiny_llama(tmp_path, seed=4, shape=shape)
    one_by_one = tokens_of(folder, rows, False, monkeypatch)
    assert tokens_of(folder, rows, True, monkeypatch) == one_by_one
    assert all(len(set(tokens)) > 5 for tokens in one_by_one), "there is something to tell apart"
