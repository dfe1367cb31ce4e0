"""`penstock bench`: figures beside their floor, on a model that is small enough for that."""

import json
from pathlib import Path

import pytest

from penstock.config import ConfigError
from penstock.executor.models.config import ModelConfig, RopeConfig
from penstock.local import embedded
from penstock.local.main import run
from penstock.local.measure.ceilings import Ceilings
from penstock.local.measure.floor import Cost
from penstock.local.measure.main import BenchConfig, draw_work

SMALL = ["--device", "cpu", "--no-progress", "--repeats", "1"]
LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    max_positions=131_072,
    window=None,
    norm_eps=1e-5,
    rope=RopeConfig(),
    tied_head=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    eos_ids=(),
    dtype="bfloat16",
)
H200 = Ceilings(
    device="H200",
    copy_bytes_s=4.28e12,
    read_bytes_s=4.01e12,
    flop_s=667e12,
    torch_version="",
    triton_version=None,
    driver=None,
)


def test_the_floor_of_an_8b_model_is_what_its_bytes_say() -> None:
    """Weights 15.0 GB and 131,072 bytes of keys and values a token, by hand."""
    cost = Cost.of(LLAMA_8B, "bfloat16")
    assert cost.weights == 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14_336) + 128_256 * 4096
    assert cost.kv_elements * cost.element_bytes == 131_072
    assert cost.step_s([600] * 8, H200) == pytest.approx(3.890e-3, rel=0.01)
    assert cost.step_s([600] * 32, H200) == pytest.approx(4.331e-3, rel=0.01)
    assert cost.prefill_s([1024] * 8, H200) == pytest.approx(0.1748, rel=0.01)
    one = cost.work_s([100], [3], H200)
    assert one == pytest.approx(
        cost.prefill_s([100], H200) + cost.step_s([101], H200) + cost.step_s([102], H200), rel=1e-9
    )


def test_the_work_is_that_of_the_benchmark_it_is_named_after() -> None:
    prompts, outputs = draw_work(BenchConfig(model_dir=Path("m")))
    assert sum(outputs) == 133_966
    assert sum(map(len, prompts)) == 142_827
    for wrong in ("x", "0", "9-3", "1-2-3"):
        with pytest.raises(ConfigError, match="prompt_tokens"):
            draw_work(BenchConfig(model_dir=Path("m"), prompt_tokens=wrong))


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into = tmp_path / "result.json"
    work = ["--requests", "3", "--prompt-tokens", "4-9", "--output-tokens", "5"]
    assert run(["bench", "throughput", str(embedded.path()), *work, *SMALL, "--json", str(into)]) == 0
    result = json.loads(into.read_text())
    assert [sample["tokens"] for sample in result["samples"]] == [15, 15]
    assert 0 < result["tokens_s"] < result["floor_tokens_s"]
    assert result["versions"]["torch"]
    assert "output tokens/s (median of 1); floor of the work" in capsys.readouterr().out


def test_work_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model has room for"):
        run(["bench", "throughput", str(embedded.path()), *SMALL, "--prompt-tokens", "2000", "--output-tokens", "2000"])


def test_latency(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "latency", str(embedded.path()), "--output-tokens", "6", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "first token " in said
    assert "each further token " in said


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "throughput", str(tmp_path), *SMALL]) == 1
    assert "config.json: no such file" in capsys.readouterr().err
    assert run(["bench"]) == 2
