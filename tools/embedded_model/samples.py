"""Sample outputs for the card: fixed prompts and seeds, the first draw of each, nothing picked."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from embedded_model.evaluate import Model, load_float32

TEXTS = ("def read_lines(path):\n", "import os\nimport sys\n\n\nclass Stack:\n")
REQUESTS = ("Write a function that reverses a list.", "Write a class for a queue.")
TEMPERATURES = (0.0, 0.7)
TOP_P = 0.95
SEED = 1
MAX_TOKENS = 120

Sample = dict[str, str | float | int | bool]


def draw_samples(model_folder: Path) -> list[Sample]:
    """Every prompt, greedy and sampled, on the CPU in float32."""
    model = load_float32(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return [
        _draw(model, tokenizer, kind, prompt, ids, temperature)
        for kind, prompt, ids in _prompts(tokenizer)
        for temperature in TEMPERATURES
    ]


def _prompts(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, list[int]]]:
    for text in TEXTS:
        yield "text", text, tokenizer(text)["input_ids"]
    for request in REQUESTS:
        messages = [{"role": "user", "content": request}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        yield "chat", request, tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _draw(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    prompt: str,
    ids: list[int],
    temperature: float,
) -> Sample:
    torch.manual_seed(SEED)
    how = {"do_sample": True, "temperature": temperature, "top_p": TOP_P, "top_k": 0}
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=MAX_TOKENS,
        pad_token_id=tokenizer.eos_token_id,
        **(how if temperature else {"do_sample": False}),
    )
    new = output[0, len(ids) :].tolist()
    return {
        "kind": kind,
        "prompt": prompt,
        "temperature": temperature,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "ended": new[-1] == tokenizer.eos_token_id,
    }
