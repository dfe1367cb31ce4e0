"""Which kernel attends the chunks of a step, and that the model's logits are the same whichever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.executor.executor import ExecutorError
from penstock.executor.step import StepPlan, pack_u32
from penstock.executor.worker.device import prefill, start
from penstock.executor.worker.device.prefill import AUTO, FLASH_ONLY, Kernel, Prefill, Rule, choose_prefill
from penstock.executor.worker.device.runner import DeviceRunner
from penstock.executor.worker.worker import Worker
from penstock.kernels.attention.chunks import AttentionShape, ChunkBackend, Chunks, LoneKernel
from penstock.kernels.attention.flash import (
    LONE_ROWS,
    MOST_SEQUENCES,
    Flash2,
    Flash4,
    FlashPages,
    FlashUnavailable,
    flash_library,
)
from support.by_hand import Kind, admission, no_progress, spec, start_of
from support.flash_stand_ins import stand_in_2, stand_in_4
from support.reference import load_reference
from support.tiny_llama import TinyLlama, build_tiny_llama

LIBRARY = Flash4(stand_in_4)
FLASH: dict[Kernel, ChunkBackend] = {
    Kernel.FLASH: FlashPages(LIBRARY),
    Kernel.FLASH_LONE: LoneKernel("lone", LIBRARY.alone, (LONE_ROWS,)),
}
PROMPT = list(range(5, 45))


def chunks(sequences: int, longest: int, cached: int | None) -> Chunks:
    slots = torch.zeros(sequences, dtype=torch.int32)
    return Chunks(slots[None], slots, slots, slots, longest, slots.long(), cached)


# ---- the table ----


@pytest.mark.parametrize(
    ("rules", "sequences", "longest", "cached", "name"),
    [
        pytest.param(AUTO, 1, 256, 0, "triton", id="a short prompt"),
        pytest.param(AUTO, 1, 8192, 0, "lone", id="a long prompt"),
        pytest.param(AUTO, 1, 8192, 64, "flash-attn-4", id="a long prompt, a little of it cached"),
        pytest.param(AUTO, 1, 8192, None, "flash-attn-4", id="a long prompt, captured"),
        pytest.param(AUTO, 8, 1024, 0, "flash-attn-4", id="several prompts"),
        pytest.param(AUTO, 4, 512, 16_384, "flash-attn-4", id="chunks of long prompts"),
        pytest.param(AUTO, 1, 512, 2048, "flash-attn-4", id="a chunk of a long prompt"),
        pytest.param(AUTO, 1, 512, 1024, "triton", id="a chunk of a short prompt"),
        pytest.param(AUTO, MOST_SEQUENCES + 1, 8, 0, "triton", id="very many prompts"),
        pytest.param(FLASH_ONLY, 1, 8, 0, "flash-attn-4", id="flash alone, a short prompt"),
        pytest.param(FLASH_ONLY, 1, 8192, 0, "lone", id="flash alone, a long prompt"),
        pytest.param(FLASH_ONLY, MOST_SEQUENCES + 1, 8, 0, "triton", id="flash alone, very many prompts"),
    ],
)
def test_the_table(rules: tuple[Rule, ...], sequences: int, longest: int, cached: int | None, name: str) -> None:
    step = chunks(sequences, longest, cached)
    assert Prefill(rules, FLASH, 8).backend(step, sequences * longest).name == name


def test_a_kernel_is_never_chosen_for_what_it_was_not_met_with() -> None:
    """Whatever the table says: it would be compiled or planned while a request waits."""
    every = tuple(Rule(kernel) for kernel in (Kernel.FLASH_LONE, Kernel.FLASH, Kernel.TRITON))

    def chosen(sequences: int, longest: int, cached: int | None, others: tuple[Kernel, ...]) -> Kernel:
        step = chunks(sequences, longest, cached)
        rules = [rule for rule in every if rule.kernel in (*others, Kernel.TRITON)]
        return next(rule.kernel for rule in rules if rule.holds(step, sequences * longest))

    assert chosen(1, LONE_ROWS, 0, (Kernel.FLASH_LONE,)) is Kernel.FLASH_LONE
    assert chosen(1, LONE_ROWS - 1, 0, (Kernel.FLASH_LONE,)) is Kernel.TRITON
    for sequences, cached in ((2, 0), (1, 5), (1, None)):
        assert chosen(sequences, 300, cached, (Kernel.FLASH_LONE,)) is Kernel.TRITON
    assert chosen(MOST_SEQUENCES, 1, 0, (Kernel.FLASH,)) is Kernel.FLASH
    assert chosen(MOST_SEQUENCES + 1, 1, 0, (Kernel.FLASH,)) is Kernel.TRITON


@pytest.mark.parametrize("rules", [AUTO, FLASH_ONLY], ids=["auto", "flash_attn"])
def test_every_step_has_a_kernel(rules: tuple[Rule, ...]) -> None:
    """Also where a machine has nothing but ours."""
    machines: list[dict[Kernel, ChunkBackend]] = [{}, FLASH]
    for others in machines:
        for sequences in (1, 2, MOST_SEQUENCES, MOST_SEQUENCES + 1):
            for rows in (1, 100, 5000):
                for cached in (None, 0, 1, 100_000):
                    step = chunks(sequences, rows, cached)
                    backend = Prefill(rules, others, 8).backend(step, rows * sequences)
                    assert others or backend.name == "triton"
                    assert step.lone or not backend.lone_only


# ---- what a machine has ----


def shape(device: str, **changes: Any) -> AttentionShape:
    settings: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "block_tokens": 64,
    }
    return AttentionShape(torch.device(device), **(settings | changes))


def test_a_machine_without_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(shape: AttentionShape) -> Flash4:
        raise FlashUnavailable("flash-attn-4 is not installed")

    monkeypatch.setattr(prefill, "flash_library", nothing)
    assert choose_prefill("auto", shape("cuda")).names == ("triton",)
    assert choose_prefill("triton", shape("cuda")).names == ("triton",)
    with pytest.raises(ExecutorError) as caught:
        choose_prefill("flash_attn", shape("cuda"))
    assert str(caught.value) == "attention_backend 'flash_attn' is not possible: flash-attn-4 is not installed"


def test_a_machine_with_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "flash_library", lambda shape: LIBRARY)
    for wanted in ("auto", "flash_attn"):
        assert choose_prefill(wanted, shape("cuda")).names == ("flash-attn-4, no pages", "flash-attn-4", "triton")
    assert choose_prefill("triton", shape("cuda")).names == ("triton",)


def test_an_older_flash_attn_is_asked_for_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "flash_library", lambda shape: Flash2(stand_in_2))
    assert choose_prefill("auto", shape("cuda", block_tokens=256)).names == ("triton",)
    assert "flash-attn 2" in choose_prefill("flash_attn", shape("cuda", block_tokens=256)).names


def test_a_cpu_asks_for_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(prefill, "flash_library")
    assert choose_prefill("auto", shape("cpu")).names == ("triton",)


# ---- the model ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyLlama(hidden_size=256, intermediate_size=512, num_hidden_layers=4, eos_token_id=None)
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=3, shape=tiny)


def logits_of_a_prompt_in_two_chunks(folder: Path, **changes: Any) -> tuple[list[int], list[torch.Tensor]]:
    """The tokens made, and the logits behind the prompt and behind the first of them."""
    worker = Worker.start(spec(folder, **changes), no_progress)
    runner = worker.runner
    assert isinstance(runner, DeviceRunner)
    if changes.get("attention_backend") == "flash_attn":
        assert worker.info.attention_backends[0].startswith("flash-attn")
    first = {"admissions": (admission(0, PROMPT),), **start_of(0, 17, list(range(8)))}
    rest = {"schedule_slots": pack_u32([0]), "schedule_rows": pack_u32([len(PROMPT) - 17])}
    made: list[int] = []
    logits = []
    for number, plan in enumerate((first, rest, {}), 1):
        runner.launch(StepPlan(1, number, **plan))  # type: ignore[arg-type]
        result = runner.collect()
        assert not result.failed
        made += list(memoryview(result.ids).cast("I"))
        logits.append(runner.logits(1)[0].cpu().float().clone())
    return made, logits[1:]


def expected_logits(folder: Path, made: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = load_reference(folder)(torch.tensor([PROMPT + made[:1]])).logits
    return logits[0, -2:]


def test_logits_with_both_kernels_of_flash_attn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk is a whole sequence alone, the second one has a cached prefix."""
    rules = (Rule(Kernel.FLASH_LONE), Rule(Kernel.FLASH))
    monkeypatch.setattr(prefill, "LONE_ROWS", 1)
    bound: list[tuple[str, int | None]] = []
    backend_of = Prefill.backend

    def backend(self: Prefill, step: Chunks, rows: int) -> object:
        found = backend_of(self, step, rows)
        bound.append((found.name, step.cached))
        return found

    monkeypatch.setattr(Prefill, "backend", backend)
    monkeypatch.setattr(start, "choose_prefill", lambda wanted, shape: Prefill(rules, FLASH, shape.heads))
    made, logits = logits_of_a_prompt_in_two_chunks(folder, resident=True)
    for got, want in zip(logits, expected_logits(folder, made), strict=True):
        assert float((got - want).norm() / want.norm()) < 2e-5
    assert bound == [("lone", 0), ("flash-attn-4", 17)]


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [{}, {"cuda_graphs": False}], ids=["graphs", "eager"])
@pytest.mark.parametrize("backend", ["triton", "flash_attn", "auto"])
def test_logits_of_each_backend_on_a_gpu(folder: Path, backend: str, graphs: Kind) -> None:
    changes: Kind = {"device": "cuda", "dtype": "bfloat16", "attention_backend": backend, "block_tokens": 64}
    if backend == "flash_attn":
        try:
            flash_library(shape("cuda", head_dim=64))
        except FlashUnavailable as reason:
            pytest.skip(str(reason))
    made, logits = logits_of_a_prompt_in_two_chunks(folder, **changes, **graphs)
    for got, want in zip(logits, expected_logits(folder, made), strict=True):
        assert float((got - want).norm() / want.norm()) < 0.05
