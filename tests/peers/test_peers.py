"""What the comparison with vLLM rests on: equal work, equal weights, and a pruned library that keeps its code."""

import json
import os
import random
import runpy
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

BENCH = Path(__file__).resolve().parents[2] / "bench"
LOADER = "vllm/model_executor/model_loader"

THEIRS = "def initialize_single_dummy_weight(param, low=-1e-3, high=1e-3, seed=1234):\n    param.uniform_(low, high)\n"
LOADS = """
import json, torch
from vllm.model_executor.model_loader.loader import initialize_single_dummy_weight as fill
matrix, norm, ids = torch.zeros(500, 400, dtype=torch.bfloat16), torch.zeros(400), torch.zeros(3, dtype=torch.int64)
for tensor in (matrix, norm, ids):
    fill(tensor, -1e-3, 1e-3, 1234)
print(json.dumps([matrix.float().std().item(), matrix.float().mean().item(), norm.unique().tolist(), ids.tolist()]))
"""


def program(name: str) -> dict[str, Any]:
    """The names of a file in bench."""
    return runpy.run_path(str(BENCH / name))


def test_mixed_work_is_that_of_nano_vllm() -> None:
    random.seed(0)
    prompts = [[random.randint(0, 10_000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    work = program("workload.py")["mixed"]()
    assert [request.prompt for request in work] == prompts
    assert [request.max_tokens for request in work] == lengths
    assert sum(lengths) == 133_966
    assert program("workload.py")["mixed"](10) == work[:10]


@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama-3.1-8b"])
def test_a_written_model_has_a_tokenizer_of_its_vocabulary(name: str, tmp_path: Path) -> None:
    folder = program("models.py")["write"](name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    ids = [5, config["vocab_size"] - 1, 0, 700]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.encode("t5 t6") == [5, 6]


def test_weights_are_normal_in_whoever_imports_the_loader(tmp_path: Path) -> None:
    package = tmp_path / LOADER
    package.mkdir(parents=True)
    (package / "weight_utils.py").write_text(THEIRS)
    theirs = "from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight\n"
    (package / "loader.py").write_text(theirs)
    path = os.pathsep.join([str(BENCH / "peers" / "normal_weights"), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", LOADS],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    deviation, mean, norms, ids = json.loads(done.stdout)
    assert deviation == pytest.approx(0.02, rel=0.02)
    assert mean == pytest.approx(0, abs=2e-4)
    assert (norms, ids) == ([1.0], [0, 0, 0])
    assert done.stderr.startswith("WEIGHTS shape=(500, 400) std=0.0")


def test_a_loader_that_has_changed_is_an_error(tmp_path: Path) -> None:
    package = tmp_path / LOADER
    package.mkdir(parents=True)
    (package / "weight_utils.py").write_text("def initialize_weights(): pass\n")
    path = os.pathsep.join([str(BENCH / "peers" / "normal_weights"), str(tmp_path)])
    command = [sys.executable, "-c", "import vllm.model_executor.model_loader.weight_utils"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ImportError" in done.stderr


def entry(kind: int, arch: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0, 64, len(code)) + bytes(12) + struct.pack("<I", arch)
    return header.ljust(64, b"h") + code


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_pruning_keeps_the_code_of_one_chip_and_the_layout() -> None:
    ptx, elf = 1, 2
    before = [
        b"start" + struct.pack("<I", 0xBA55ED50) + b"only looks like one",
        container(entry(elf, 80, b"a" * 40), entry(elf, 90, b"b" * 24), entry(ptx, 90, b"c" * 8)),
        container(entry(ptx, 75, b"d" * 16)),
    ]
    after = [
        before[0],
        container(entry(elf, 80, bytes(40)), entry(elf, 90, b"b" * 24), entry(ptx, 90, bytes(8))),
        before[2],
    ]
    library = bytearray(b"".join(before))
    assert program("peers/fatprune.py")["prune"](library) == 48
    assert bytes(library) == b"".join(after)
