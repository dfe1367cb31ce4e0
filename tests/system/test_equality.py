"""The whole path computes what `transformers` computes: token for token, through preemption and in a crowd."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from penstock.v1 import FinishReason, GetStatusResponse
from support.clients import caller, collect, request, status_at_rest
from support.stack import stack
from support.tiny_llama import TinyLlama, build_tiny_llama

SHAPE = TinyLlama()
EOS = SHAPE.eos_token_id


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", seed=3, shape=SHAPE, tokenizer=True)


def prompts(count: int) -> list[tuple[list[int], int]]:
    """Prompts of mixed lengths, and how many tokens to make of each."""
    rng = random.Random(11)
    return [([rng.randrange(3, 259) for _ in range(rng.randint(1, 150))], rng.randint(50, 100)) for _ in range(count)]


def reference(model: Path, work: list[tuple[list[int], int]]) -> list[list[int]]:
    """Greedy continuations by transformers, one prompt at a time, in float32."""
    torch.set_num_threads(2)
    llama: Any = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    outputs = []
    for prompt, most in work:
        ids = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


async def test_sixty_four_requests_equal_transformers(model: Path) -> None:
    """With one plan in flight and with two: transformers is asked once, for it takes longer than we do."""
    work = prompts(64)
    expected = await asyncio.to_thread(reference, model, work)
    for plans_in_flight in (1, 2):
        answers, seen = await served(model, work, plans_in_flight)
        assert [ids for ids, _ in answers] == expected
        for (ids, reason), (_, most) in zip(answers, work, strict=True):
            assert reason == (FinishReason.STOP if ids[-1] == EOS else FinishReason.LENGTH)
            assert len(ids) == most or ids[-1] == EOS
        assert seen.preemptions >= 30
        if plans_in_flight == 2:
            assert seen.preemptions_in_flight >= 1


async def served(
    model: Path, work: list[tuple[list[int], int]], plans_in_flight: int
) -> tuple[list[tuple[list[int], FinishReason]], GetStatusResponse]:
    """What the whole path makes of all requests at once, and the scheduler's status behind them."""
    with stack(
        model,
        dtype="float32",
        block_tokens=16,
        num_blocks=40,
        max_model_tokens=256,
        max_sequences=48,
        max_step_tokens=64,
        plans_in_flight=plans_in_flight,
    ) as roles:
        async with caller(roles.address) as stubs:
            answers = await asyncio.gather(*(collect(stubs, request(prompt, max_tokens=most)) for prompt, most in work))
        return answers, await status_at_rest(roles.scheduler.address)


async def test_seeded_samples_are_the_same_alone_and_in_a_crowd(model: Path) -> None:
    settings = {"block_tokens": 16, "num_blocks": 60, "max_model_tokens": 256, "plans_in_flight": 2, "dtype": "float32"}
    work = [
        request(prompt, max_tokens=30, temperature=0.9, top_p=0.95, top_k=50, seed=1000 + i, ignore_eos=True)
        for i, (prompt, _) in enumerate(prompts(16))
    ]
    with stack(model, **settings) as roles:
        async with caller(roles.address) as stubs:
            alone = [await collect(stubs, each) for each in work]
            crowd = await asyncio.gather(*(collect(stubs, each) for each in work))
    assert [ids for ids, _ in alone] == [ids for ids, _ in crowd]
    assert len({tuple(ids) for ids, _ in alone}) == 16
