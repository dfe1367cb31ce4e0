"""Held-out bits per byte of the exported folder, by Hugging Face's own Llama in float32."""

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from embedded_model.export import BEGIN_ID
from embedded_model.records import read_record, write_record
from embedded_model.train import hardware, load_stream

# Typed loosely: the annotations of `from_pretrained` and `generate` do not admit their documented use.
Model = Any  # transformers.LlamaForCausalLM

BATCH = 16


def evaluate(build: Path, model_folder: Path, device: str) -> None:
    """Writes `evaluation.json` into the build folder: bits per byte on the held-out files."""
    model = load_float32(model_folder).to(device)
    context = model.config.max_position_embeddings
    nats = held_out_nats(model, documents(load_stream(build, "held_out")), context)
    size_bytes = read_record(build / "corpus.json")["bytes"]["held_out"]
    facts = {
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "window_tokens": context,
        "stride_tokens": context // 2,
        "bits_per_byte": nats / math.log(2) / size_bytes,
    }
    write_record(build / "evaluation.json", facts)
    print(f"held-out bits per byte: {facts['bits_per_byte']:.4f}")


def load_float32(model_folder: Path) -> Model:
    """The exported model, widened to float32, on the CPU."""
    model: Model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return model.eval()


def documents(stream: Tensor) -> list[Tensor]:
    """The stream cut before every begin token."""
    starts = torch.nonzero(stream == BEGIN_ID).flatten()[1:]
    return list(torch.tensor_split(stream, starts))


@torch.no_grad()
def held_out_nats(model: Model, texts: list[Tensor], context: int) -> float:
    """Negative log-likelihood of every token after each text's first, the end token included."""
    windows = [window for text in texts for window in _windows(text, context)]
    windows.sort(key=lambda window: len(window.ids))
    total = 0.0
    for start in range(0, len(windows), BATCH):
        total += _nats(model, windows[start : start + BATCH])
    return total


@dataclass(frozen=True, slots=True)
class _Window:
    """Up to context + 1 ids, of which those from `first_scored` on are predicted here."""

    ids: Tensor
    first_scored: int


def _windows(text: Tensor, context: int) -> Iterator[_Window]:
    """Overlapping by half, so that after the first window each token is seen with at least half a context."""
    stride = context // 2
    scored = 1
    for start in range(0, len(text), stride):
        window = text[start : start + context + 1]
        yield _Window(window, scored - start)
        scored = start + len(window)
        if scored == len(text):
            return


def _nats(model: Model, windows: list[_Window]) -> float:
    ids = nn.utils.rnn.pad_sequence([window.ids for window in windows], batch_first=True)
    ids = ids.to(model.device)
    logits = model(input_ids=ids[:, :-1]).logits.float()
    nats = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    position = torch.arange(1, ids.shape[1])
    lengths = torch.tensor([len(window.ids) for window in windows])[:, None]
    first = torch.tensor([window.first_scored for window in windows])[:, None]
    scored = (position >= first) & (position < lengths)
    return float(nats.double()[scored.to(nats.device)].sum())
