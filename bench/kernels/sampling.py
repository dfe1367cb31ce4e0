"""What the sampling tail costs: ``python bench/kernels/sampling.py [--out FILE]``.

Microseconds of one step's tail, replayed from a CUDA graph, and the share of its floor: the time in which its logits,
bfloat16, are read once at the rate that a matrix-vector product reads its matrix here. Logits that fit the L2 cache are
read faster than that, as they are behind the product that made them.

``peaked`` rows have a nucleus of about a hundred tokens, as a language model mostly does; in ``flat`` ones it is more
than the filters set apart, and they search the whole row. One JSON line a figure.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from penstock.kernels.batch.state import LIVE, ArenaLayout, BatchState
from penstock.kernels.sampling.tail import TailOutput, sample_step

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_timing import Report, graph_us, read_rate

ROWS = (1, 8, 64, 128, 256, 512)
VOCABULARIES = (128_256, 151_936)
MODES = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_k": (0.8, 50, 1.0, 0.0),
    "top_p": (0.8, 0, 0.9, 0.0),
    "top_k_top_p": (0.6, 20, 0.95, 0.0),
    "min_p": (0.8, 0, 1.0, 0.05),
}
"""Temperature, top-k, top-p, min-p."""


def flat_logits(rows: int, vocab: int) -> Tensor:
    """bfloat16, normal."""
    return torch.randn(rows, vocab, dtype=torch.bfloat16, device="cuda")


def peaked_logits(rows: int, vocab: int) -> Tensor:
    """bfloat16, normal but for 500 tokens of falling probability."""
    logits = flat_logits(rows, vocab) * 2
    ranked = 18 - 0.03 * torch.arange(500, device="cuda")
    return logits.index_copy_(1, torch.randperm(vocab, device="cuda")[:500], ranked.bfloat16().expand(rows, -1))


def tail_us(logits: Tensor, mode: str) -> list[float]:
    """Of one step whose rows all sample alike, with one stop id each and no end in sight."""
    rows, vocab = logits.shape
    device = logits.device
    state = BatchState.allocate(ArenaLayout(rows, 1, rows), device, scratch_block=0)
    out = TailOutput.allocate(rows, vocab, device)
    temperature, top_k, top_p, min_p = MODES[mode]
    live = slice(0, rows)
    state.live[live] = LIVE
    state.max_tokens[live] = 2**30
    state.temperature[live] = temperature
    state.top_k[live] = top_k
    state.top_p[live] = top_p
    state.min_p[live] = min_p
    state.stop_count[live] = 1
    state.stop_ids[live, 0] = vocab
    state.seeds[live, 0] = torch.arange(rows, dtype=torch.int32, device=device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    filtered = mode not in ("greedy", "temperature")
    samples = graph_us(lambda: sample_step(logits, slots, state, out, filtered=filtered))
    if not bool((state.live[live] == LIVE).all()):
        raise RuntimeError(f"{mode}: rows ended or failed while they were measured")
    return samples


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    out = parser.parse_args().out
    torch.manual_seed(0)
    rate = read_rate()
    report = Report("sampling", out, read_bytes_s=rate)
    for vocab in VOCABULARIES:
        for rows in ROWS:
            for shape, make in (("peaked", peaked_logits), ("flat", flat_logits)):
                logits = make(rows, vocab)
                for mode in MODES if shape == "peaked" else ("top_p",):
                    samples = tail_us(logits, mode)
                    us, floor = statistics.median(samples), 1e6 * logits.numel() * 2 / rate
                    report(
                        vocab=vocab, rows=rows, mode=mode, logits=shape, us=round(us, 2), floor_us=round(floor, 2),
                        share=round(floor / us, 3), samples=[round(sample, 2) for sample in samples],
                    )  # fmt: skip


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: an NVIDIA GPU is needed")
    main()
