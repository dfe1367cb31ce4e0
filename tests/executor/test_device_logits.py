"""How far bfloat16 is from float32, on the device's own path: a prompt in two chunks, then a decode step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.executor.models import llama
from penstock.executor.step import StepPlan, pack_u32
from penstock.executor.worker import model_runner
from penstock.executor.worker.device.runner import DeviceRunner
from penstock.executor.worker.worker import Worker
from support.by_hand import Kind, admission, no_progress, spec, start_of
from support.reference import load_reference
from support.tiny_llama import FAMILIES, TinyLlama, build_tiny_llama

BOUND = {"float32": 2e-5, "bfloat16": 0.05}
"""Of ‖logits − reference‖ / ‖reference‖, the reference in float32 on a CPU."""
PROMPT = list(range(5, 45))


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "eos_token_id": None}
SHAPES: dict[str, dict[str, Any]] = {family: {"model_type": family, **SIZES} for family in FAMILIES}
SHAPES["biases"] = {"attention_bias": True, "mlp_bias": True, **SIZES}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp(request.param), seed=3, shape=TinyLlama(**SHAPES[request.param]))


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_stay_within_the_bound(
    folder: Path, dtype: str, late: bool, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``late``: normalised behind the products, which have taken over the norms' weights."""
    monkeypatch.setattr(llama, "late_pays", lambda rows, size: late)
    monkeypatch.setattr(model_runner, "absorbs", lambda device, dtype: late)
    if kind.get("resident") is False:
        pytest.skip("the host's path has no such state to look at")
    worker = Worker.start(spec(folder, **kind, dtype=dtype), no_progress)
    runner = worker.runner
    assert isinstance(runner, DeviceRunner)
    known = admission(0, PROMPT)
    first = start_of(0, 17, list(range(20)))
    rest = {"schedule_slots": pack_u32([0]), "schedule_rows": pack_u32([len(PROMPT) - 17])}
    made: list[int] = []
    logits = []
    for number, changes in enumerate(({"admissions": (known,), **first}, rest, {}), 1):
        runner.launch(StepPlan(1, number, **changes))  # type: ignore[arg-type]
        result = runner.collect()
        assert not result.failed
        made += list(memoryview(result.ids).cast("I"))
        logits.append(runner.logits(1)[0].cpu().float().clone())
    with torch.inference_mode():
        expected = load_reference(folder)(torch.tensor([PROMPT + made[:1]])).logits[0]
    for got, want in zip(logits[1:], expected[-2:], strict=True):
        assert float((got - want).norm() / want.norm()) < BOUND[dtype]
