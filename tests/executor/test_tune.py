"""The search for the best cut: what a bench computes, and what a search makes of times that are known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from penstock.executor.layers.attention import AttentionBatch
from penstock.executor.layers.few_rows import StepWeights
from penstock.executor.models.config import read_config
from penstock.executor.models.llama import Llama
from penstock.executor.models.registry import build_model
from penstock.executor.models.weights import load_weights
from penstock.executor.worker.device import tune as tuning
from penstock.executor.worker.device.few_rows import FewRowsStep
from penstock.executor.worker.device.tune import BLOCK_TOKENS, TOKENS, WORTH, StepBench, Tried, Tuner, tokens_of, tune
from penstock.kernels.attention.reference import Scratch
from penstock.kernels.gemv.neighbours import alternatives, attention_alternatives
from penstock.kernels.gemv.shapes import PRODUCTS, StepShape, context_class, default_shape, starts
from penstock.kernels.gemv.tuned import Entry
from support.tiny_llama import TINY_QWEN2, TINY_QWEN3, TinyLlama, build_tiny_llama

CPU = torch.device("cpu")
WIDE = TinyLlama(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=320)
"""Products wide enough that there are several cuts of each."""
Cost = Callable[[StepShape], float]


def quiet(line: str) -> None:
    """Nobody is told."""


def model_of(folder: Path, shape: TinyLlama) -> Llama:
    build_tiny_llama(folder, seed=7, shape=shape)
    model = build_model(read_config(folder), torch.float32, CPU)
    load_weights(model, folder, lambda done, total: None)
    assert isinstance(model, Llama)
    return model


def weights_of(folder: Path, shape: TinyLlama = WIDE) -> StepWeights:
    weights = model_of(folder, shape).few_rows()
    assert weights is not None
    return weights


def default_of(weights: StepWeights, rows: int = 1, context: int = 0) -> StepShape:
    shape = default_shape(weights.sizes, rows, context)
    assert shape is not None
    return shape


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# ---- a bench ----


@pytest.mark.parametrize("absorbed", [False, True], ids=["", "absorbed norms"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 64), (2, 65), (2, 200)])
@pytest.mark.parametrize(
    "shape",
    [TinyLlama(), replace(TINY_QWEN3, head_dim=16), TINY_QWEN2, replace(WIDE, num_key_value_heads=4)],
    ids=["llama", "qwen3", "qwen2", "wide"],
)
def test_a_bench_computes_what_the_model_does(
    shape: TinyLlama, rows: int, tokens: int, absorbed: bool, tmp_path: Path
) -> None:
    model = model_of(tmp_path, shape)
    weights = model.few_rows()
    assert weights is not None
    bench = StepBench(weights, rows, tokens)
    bench.state.last_token[:rows] = torch.tensor([7, 300][:rows])
    bench._start.copy_(bench.state.arena)
    held = [(cache.keys.clone(), cache.values.clone()) for cache in bench.pages]

    def put_back() -> None:
        for cache, (keys, values) in zip(bench.pages, held, strict=True):
            cache.keys.copy_(keys)
            cache.values.copy_(values)

    batch = AttentionBatch.build(
        torch.full((rows,), tokens - 1),
        torch.arange(rows + 1, dtype=torch.int32),
        torch.full((rows,), tokens, dtype=torch.int32),
        bench.state.block_tables[:rows].clone(),
        block_tokens=BLOCK_TOKENS,
        scratch=Scratch(torch.float32),
    )
    ids = bench.state.last_token[:rows].long()
    with torch.inference_mode():
        want = model.logits(model.forward(ids, batch, bench.pages, None))
        put_back()
        if absorbed:
            model.absorb_norms()
            absorbing = model.few_rows()
            assert absorbing is not None
            bench.weights = bench.step._weights = absorbing
        got = bench.run(default_of(weights, rows)).clone()
        put_back()
        reference = bench.reference()
    assert distance(got, want) < 1e-4
    assert distance(reference, want) < 1e-4


def test_the_reference_is_of_the_keys_that_the_pages_hold(tmp_path: Path) -> None:
    bench = StepBench(weights_of(tmp_path), 2, 100)
    before = bench.reference()
    bench.pages[1].values[int(bench.state.block_tables[1, 0]), 5] += 1
    after = bench.reference()
    assert torch.equal(after[0], before[0])
    assert distance(after[1], before[1]) > 1e-4


def test_a_step_that_leaves_no_logits_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    bench = StepBench(weights, 1, 100)
    tuner = Tuner(bench, 60, quiet)
    bench.run(default_of(weights))
    monkeypatch.setattr(bench.step, "compute", lambda rows, shape: None)
    assert tuner.measure(default_of(weights)) is None, "those of the step before are not there any more"
    assert math.isnan(tuner.refused[0][1])


# ---- a search ----


class Search:
    """A search among times that ``cost`` makes up."""

    def __init__(self, weights: StepWeights, monkeypatch: pytest.MonkeyPatch, cost: Cost, limit_s: float = 60) -> None:
        self.weights, self.lines = weights, list[str]()
        self.bench = StepBench(weights, 1, 100)
        self.bounds: list[float] = []

        def milliseconds(bench: StepBench, shape: StepShape, most: float = math.inf) -> float:
            self.bounds.append(most)
            return cost(shape)

        monkeypatch.setattr(StepBench, "milliseconds", milliseconds)
        self.tuner = Tuner(self.bench, limit_s, self.lines.append)

    def from_default(self, *, attention_only: bool = False) -> Tried:
        start = self.tuner.measure(default_of(self.weights))
        assert start is not None
        self.tuner.most_error = 1.2 * start.error
        return self.tuner.descend(start, attention_only=attention_only)


def numbers(shape: StepShape) -> list[float]:
    """What there is to choose, in steps of a search."""
    products = [getattr(shape, name) for name in PRODUCTS]
    attend = shape.attention
    return [
        *(math.log2(count) for cut in products for count in (cut.outputs, cut.inputs, cut.warps)),
        *(float(cut.ahead) for cut in products),
        *(math.log2(count) for count in (attend.splits, attend.tile, attend.warps)),
        float(attend.stages),
        float(attend.merged),
    ]


def away_from(target: StepShape) -> Cost:
    wanted = numbers(target)

    def cost(shape: StepShape) -> float:
        return 1 + sum(abs(one - other) for one, other in zip(numbers(shape), wanted, strict=True)) / 4

    return cost


def wandered(weights: StepWeights, steps: int, seed: int) -> StepShape:
    """Somewhere that a search can get to."""
    drawn = random.Random(seed)
    shape = default_of(weights)
    for _ in range(steps):
        part = drawn.choice([*PRODUCTS, "attention"])
        near = list(attention_alternatives(shape) if part == "attention" else alternatives(shape, weights.sizes, part))
        shape = drawn.choice(near) if near else shape
    return shape


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_best(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    target = wandered(weights, 30, seed)
    search = Search(weights, monkeypatch, away_from(target))
    best = search.from_default()
    assert best.shape == target != default_of(weights)
    assert best.ms == 1
    assert best.error < 1e-4
    assert len(search.lines) > 1
    assert search.bounds == sorted(search.bounds, reverse=True)
    assert search.bounds[-1] == 1, "what is slower than the best so far need not be timed well"
    assert len(search.bounds) == search.tuner.tries < 600


def test_nothing_is_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    met: list[StepShape] = []
    cost = away_from(wandered(weights, 30, 1))
    Search(weights, monkeypatch, lambda shape: met.append(shape) or cost(shape)).from_default()  # type: ignore[func-returns-value]
    assert len(met) == len(set(met))


def test_cuts_are_compiled_before_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    inside, compiled, met = [False], set[StepShape](), set[StepShape]()
    compute = FewRowsStep.compute

    @contextmanager
    def compiling(device: torch.device) -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def computed(step: FewRowsStep, rows: int, shape: StepShape) -> None:
        (compiled if inside[0] else met).add(shape)
        compute(step, rows, shape)

    monkeypatch.setattr(tuning, "can_compile_ahead", lambda: True)
    monkeypatch.setattr(tuning, "compiled_ahead", compiling)
    monkeypatch.setattr(FewRowsStep, "compute", computed)
    Search(weights, monkeypatch, away_from(wandered(weights, 30, 1))).from_default()
    assert met - compiled == {default_of(weights)}


def test_what_is_hardly_faster_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    default = default_of(weights)
    search = Search(weights, monkeypatch, lambda shape: 1.0 if shape == default else 1.001 * WORTH)
    assert search.from_default().shape == default


def test_attention_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    target = wandered(weights, 30, 2)
    best = Search(weights, monkeypatch, away_from(target)).from_default(attention_only=True)
    assert best.shape == replace(default_of(weights), attention=target.attention)


@pytest.mark.parametrize("wrong", ["noise", "nan", "zeros", "scaled"])
def test_what_is_wrong_is_never_taken(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast."""
    weights = weights_of(tmp_path)
    default = default_of(weights)
    target = replace(wandered(weights, 30, 3), qkv=replace(default.qkv, warps=8), attention=default.attention)
    far = away_from(target)
    search = Search(weights, monkeypatch, lambda shape: far(shape) / (1000 if is_wrong(shape) else 1))
    run = search.bench.run

    def is_wrong(shape: StepShape) -> bool:
        return shape.qkv.warps == default.qkv.warps // 2 or shape.attention.tile == default.attention.tile // 2

    def computed(shape: StepShape) -> Tensor:
        logits = run(shape)
        if not is_wrong(shape):
            return logits
        return {
            "noise": logits + 0.1 * torch.randn_like(logits),
            "nan": logits.index_fill(1, torch.tensor([5]), float("nan")),
            "zeros": torch.zeros_like(logits),
            "scaled": logits * 1.01,
        }[wrong]

    monkeypatch.setattr(search.bench, "run", computed)
    best = search.from_default()
    assert best.shape == target
    refused = search.tuner.refused
    assert len(refused) > 1
    assert all(is_wrong(shape) and not error < 1e-3 for shape, error in refused)


def test_what_cannot_be_launched_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    target = wandered(weights, 30, 4)
    stages = next(count for count in range(1, 5) if count not in (target.attention.stages, 2))
    search = Search(weights, monkeypatch, away_from(target))
    run = search.bench.run

    def computed(shape: StepShape) -> Tensor:
        if shape.attention.stages == stages:
            raise RuntimeError("out of resource: shared memory")
        return run(shape)

    monkeypatch.setattr(search.bench, "run", computed)
    best = search.from_default()
    assert best.shape.attention.stages != stages
    assert best.shape.down == target.down
    assert "cannot be launched: RuntimeError" in search.lines


def test_stops_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: clock.now))
    far = away_from(wandered(weights, 30, 5))

    def cost(shape: StepShape) -> float:
        clock.now += 1
        return far(shape)

    search = Search(weights, monkeypatch, cost, limit_s=8)
    best = search.from_default()
    assert search.tuner.tries == 9, "the last one began when time was just not up"
    assert best.ms == min(far(shape) for shape in search.tuner._seen) < far(default_of(weights))


# ---- the whole ----


def tuned(weights: StepWeights, rows: int, context: int, near: StepShape | None = None) -> Entry | None:
    return tune(weights, rows, context, near=near, limit_s=60, measured="by hand", told=quiet)


@pytest.mark.parametrize("rows", [1, 2])
def test_an_entry_tells_what_was_measured(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    target = wandered(weights, 20, 6)
    cost = away_from(target)
    monkeypatch.setattr(StepBench, "milliseconds", lambda bench, shape, most=math.inf: cost(shape))
    entry = tuned(weights, rows, 0)
    assert entry is not None
    assert (entry.sizes, entry.rows, entry.context, entry.shape) == (weights.sizes, rows, 0, target)
    assert (entry.step_ms, entry.tokens, entry.measured) == (1, TOKENS[0], "by hand")
    assert entry.default_ms == round(cost(default_of(weights, rows)), 5) > 1
    assert 0 <= entry.error < 1e-4
    assert 0 <= entry.default_error < 1e-4


def test_the_search_begins_at_the_best_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no single change helps, another start may."""
    weights = weights_of(tmp_path)
    last = starts(weights.sizes, 1, 0)[-1]
    monkeypatch.setattr(
        StepBench, "milliseconds", lambda bench, shape, most=math.inf: 1.0 if shape == last else 2.0
    )  # fmt: skip
    entry = tuned(weights, 1, 0)
    assert entry is not None
    assert entry.shape == last != default_of(weights)


def test_the_whole_holds_candidates_to_the_error_of_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(tmp_path)
    run = StepBench.run

    def computed(bench: StepBench, shape: StepShape) -> Tensor:
        return run(bench, shape) * (1.01 if shape.attention.tile == 32 else 1)

    monkeypatch.setattr(StepBench, "run", computed)
    monkeypatch.setattr(StepBench, "milliseconds", lambda bench, shape, most=math.inf: float(shape.attention.tile))
    entry = tuned(weights, 1, 0)
    assert entry is not None
    assert entry.shape.attention.tile == 64
    assert entry.error < 1e-4


def test_near_a_shorter_context_attention_alone_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path, replace(WIDE, max_position_embeddings=4096))
    near, attention = wandered(weights, 20, 8), wandered(weights, 40, 9).attention
    assert attention != near.attention
    better, *_ = alternatives(near, weights.sizes, "down")
    cost = away_from(replace(better, attention=attention))
    monkeypatch.setattr(StepBench, "milliseconds", lambda bench, shape, most=math.inf: cost(shape))
    entry = tuned(weights, 1, 1, near)
    assert entry is not None
    assert entry.shape == replace(near, attention=attention)
    assert entry.tokens == TOKENS[1]


def test_a_model_that_the_kernels_do_not_take(tmp_path: Path) -> None:
    assert tuned(weights_of(tmp_path, TINY_QWEN3), 1, 0) is None


def test_a_default_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tmp_path)
    for bad in (float("nan"), float("inf")):
        monkeypatch.setattr(StepBench, "run", lambda bench, shape, bad=bad: torch.full((1, 320), bad))
        monkeypatch.setattr(StepBench, "milliseconds", lambda bench, shape, most=math.inf: 1.0)
        with pytest.raises(RuntimeError, match="the default cut for 1 rows of this model is wrong"):
            tuned(weights, 1, 0)


@pytest.mark.parametrize(
    ("positions", "tokens"),
    [
        (512, [256, None, None]),
        (300, [236, None, None]),
        (64, [None, None, None]),
        (1200, [256, 1136, None]),
        (8192, [256, 2048, None]),
        (12_000, [256, 2048, 11_936]),
        (40_960, list(TOKENS)),
    ],
)
def test_steps_are_measured_where_the_model_has_positions(
    positions: int, tokens: list[int | None], tmp_path: Path
) -> None:
    weights = weights_of(tmp_path, replace(WIDE, max_position_embeddings=positions))
    assert [tokens_of(weights, context) for context in range(3)] == tokens
    assert all(count is None or context_class(count) == context for context, count in enumerate(tokens))


def test_a_class_of_contexts_that_the_model_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepBench, "milliseconds", lambda bench, shape, most=math.inf: 1.0)
    assert tuned(weights_of(tmp_path), 1, 1) is None
    entry = tuned(weights_of(tmp_path, replace(WIDE, max_position_embeddings=1200)), 1, 1)
    assert entry is not None
    assert entry.tokens == 1136
