"""The requests of the benchmarks: mixed lengths, or one length, always the same from the same seed."""

import random
from typing import NamedTuple

REQUESTS = 256
MAX_ID = 10_000


class Work(NamedTuple):
    """One request: the ids of its prompt, and how many tokens it makes."""

    prompt: list[int]
    max_tokens: int


def mixed(requests: int = REQUESTS) -> list[Work]:
    """The first of 256 requests with prompts and outputs of 100 to 1,024 tokens; 133,966 output tokens in all.

    Drawn in the order of the benchmark of nano-vllm, so that its figures are of the same work.
    """
    draw = random.Random(0).randint
    prompts = [[draw(0, MAX_ID) for _ in range(draw(100, 1024))] for _ in range(REQUESTS)]
    return [Work(prompt, draw(100, 1024)) for prompt in prompts][:requests]


def uniform(requests: int, prompt_tokens: int, max_tokens: int, *, vocab_size: int, seed: int) -> list[Work]:
    """Requests of one length."""
    draw = random.Random(seed).randrange
    return [Work([draw(10, vocab_size - 10) for _ in range(prompt_tokens)], max_tokens) for _ in range(requests)]
