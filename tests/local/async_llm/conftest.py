"""The models and the executors of these tests, none of which leaves a thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.local import AsyncLLM
from penstock.local.offline import engine
from support.async_engine import SLOTS, VOCABULARY, Make, Paced
from support.tiny_llama import TinyLlama, build_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyLlama(eos_token_id=None, max_position_embeddings=1024)
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=21, shape=shape, tokenizer=True)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    give_up = time.monotonic() + 10  # those that encode end by themselves
    while (left := set(threading.enumerate()) - before) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not left


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    def make(executor: Paced) -> AsyncLLM:
        monkeypatch.setattr(engine, "create_executor", lambda name: executor)
        tmp_path.joinpath("config.json").write_text(f'{{"vocab_size": {VOCABULARY}}}')
        return AsyncLLM(tmp_path, executor="simulated", max_sequences=SLOTS, progress=False)

    return make
