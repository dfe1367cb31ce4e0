"""`penstock tune` without a GPU: what it measures, in which order, and what it writes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.config import ConfigError
from penstock.executor.worker import model_runner, worker
from penstock.executor.worker.device.tune import StepBench
from penstock.executor.worker.model_runner import LoadedModel
from penstock.kernels.gemv import shapes
from penstock.kernels.gemv.shapes import StepShape
from penstock.kernels.gemv.tuned import read_entries
from penstock.local.main import run
from support.tiny_llama import TINY_QWEN3, TinyLlama, build_tiny_llama

CHOOSE_DEVICE = worker.choose_device
LONG = TinyLlama(max_position_embeddings=4096, hidden_size=256, intermediate_size=512)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tuned"


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A GPU that is the CPU, in float32, and prefers few splits; where contexts are long, few warps, too."""
    load = model_runner.load_model

    def loaded(path: Path, dtype: str, on_progress: Any, *, device: torch.device, load_format: str) -> LoadedModel:
        assert (dtype, device.type, load_format) == ("bfloat16", "cuda", "dummy")
        return load(path, "float32", on_progress, device=torch.device("cpu"), load_format=load_format)

    def milliseconds(bench: StepBench, shape: StepShape, most: float = math.inf) -> float:
        return 1 + math.log2(shape.attention.splits) + (math.log2(shape.down.warps) if bench.tokens > 1024 else 0)

    monkeypatch.setenv("PENSTOCK_TUNED", str(folder))
    monkeypatch.setattr(worker, "choose_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(model_runner, "load_model", loaded)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Abacus")
    monkeypatch.setattr(StepBench, "milliseconds", milliseconds)


def test_writes_an_entry_for_each_step(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(build_tiny_llama(tmp_path / "model", shape=LONG))
    assert run(["tune", model, "--contexts", "0,1"]) == 0
    entries = read_entries(folder / "nvidia_abacus.json")
    assert [(entry.rows, entry.context) for entry in entries] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    for entry in entries:
        assert entry.shape.attention.splits == 1
        assert entry.shape.down == entries[0].shape.down, "for longer contexts all but attention is kept"
        assert entry.shape.down.warps == 4
        assert entry.step_ms == (3 if entry.context else 1) < entry.default_ms
        assert "torch" in entry.measured
    said = capsys.readouterr()
    assert said.out.endswith(f"written to {folder / 'nvidia_abacus.json'}\n")
    assert "2 rows, 2048 tokens: 3.000 ms a step" in said.out
    assert said.err == ""


def test_contexts_that_the_model_does_not_have_are_left_out(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(build_tiny_llama(tmp_path / "model", shape=LONG))
    assert run(["tune", model, "--rows", "1", "--contexts", "2,0", "--output", str(tmp_path / "mine.json")]) == 0
    assert [entry.context for entry in read_entries(tmp_path / "mine.json")] == [0]
    assert "contexts 2: the model has no positions for them\n" in capsys.readouterr().out
    assert not folder.exists()


def test_a_model_that_the_kernels_do_not_take(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(build_tiny_llama(tmp_path / "model", shape=TINY_QWEN3))
    assert run(["tune", model, "--rows", "1", "--contexts", "0"]) == 1
    assert capsys.readouterr().err == f"error: {model}: the kernels for few rows do not take this model\n"
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", ""], "rows '': must be numbers separated by commas"),
        (["--rows", "1,9"], "rows 9: must be from 1 to 3"),
        (["--rows", "0"], "rows 0: must be from 1 to 3"),
        (["--contexts", "3"], "contexts 3: must be from 0 to 2"),
    ],
)
def test_numbers_that_are_none(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        run(["tune", str(tmp_path), *words])


@pytest.mark.parametrize(("device", "message"), [("cpu", "is no GPU"), ("abacus", "is not known")])
def test_a_device_that_is_no_gpu(
    device: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "choose_device", CHOOSE_DEVICE)
    assert run(["tune", str(tmp_path), "--device", device]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: device '{device}' ")
    assert message in said
    assert said.count("\n") == 1


def test_more_rows_than_the_kernels_are_used_for(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "SMALL_MODEL", LONG.hidden_size - 1)
    model = str(build_tiny_llama(tmp_path / "model", shape=LONG))
    assert run(["tune", model, "--rows", "2,3"]) == 1
    said = capsys.readouterr().err
    assert said == f"error: {model}: steps of more than 2 rows have other kernels in this model\n"
    assert not folder.exists()


@pytest.mark.parametrize("broken", ["there", "named"])
def test_a_file_that_cannot_be_added_to_is_one_line(
    broken: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(build_tiny_llama(tmp_path / "model", shape=LONG))
    path = tmp_path / "mine.json" if broken == "named" else folder / "nvidia_abacus.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("[")
    named = ["--output", str(path)] if broken == "named" else []
    assert run(["tune", model, "--rows", "1", "--contexts", "0", *named]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {path} holds no tuned shapes: ")
    assert said.err.count("\n") == 1
    assert said.out == "", "it is told before anything is measured"


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", str(tmp_path), "--rows", "1"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
