"""The model in this process: many prompts at once, and step by step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from penstock.executor.executor import ExecutorError
from penstock.local import LLM, LLMEngine, SamplingParams, embedded
from penstock.local.offline.llm import longest_first
from support.reference import greedy_tokens
from support.tiny_llama import TinyLlama, build_tiny_llama

SMALL = {"device": "cpu", "threads": 1, "max_sequences": 6, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyLlama(eos_token_id=None)
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=21, shape=shape, tokenizer=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, **SMALL)


def test_greedy_tokens_are_those_of_transformers_in_the_order_of_the_prompts(llm: LLM, folder: Path) -> None:
    prompts = [[5 + number, 9, 30, 7 + number] for number in range(12)]
    params = [SamplingParams(temperature=0, max_tokens=3 + number) for number in range(12)]
    outputs = llm.generate(prompts, params, progress=False)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        assert one.max_tokens is not None
        (made,) = output.outputs
        assert made.token_ids == greedy_tokens(folder, prompt, one.max_tokens)
        assert (made.finish_reason, output.finished) == ("length", True)
        assert output.first_token_s is not None
        assert output.finished_s is not None
        assert 0 < output.first_token_s <= output.finished_s


def test_those_that_make_most_begin_first() -> None:
    assert longest_first([3, None, 7, 7, 1]) == [1, 2, 3, 0, 4]
    assert longest_first([None, None]) == [0, 1]
    assert longest_first([]) == []


def test_text_in_and_out(llm: LLM) -> None:
    (output,) = llm.generate("hello there", SamplingParams(temperature=0, max_tokens=12), progress=False)
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    assert output.prompt_token_ids == tokenizer.encode("hello there").tolist()
    both = tokenizer.decode([*output.prompt_token_ids, *output.outputs[0].token_ids])
    assert both == tokenizer.decode(output.prompt_token_ids) + output.outputs[0].text


def test_a_stop_text_ends_the_output_before_it(llm: LLM) -> None:
    free = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=40), progress=False)[0].outputs[0]
    stop = free.text[10:13]
    params = SamplingParams(temperature=0, max_tokens=40, stop=stop)
    made = llm.generate([5, 6, 7], params, progress=False)[0].outputs[0]
    assert made.text == free.text[: free.text.index(stop)]
    assert (made.finish_reason, made.stop_reason) == ("stop", stop)
    assert made.token_ids == free.token_ids[: len(made.token_ids)]
    assert not llm.engine.has_unfinished_requests


def test_stop_ids_and_seeds_and_samples(llm: LLM) -> None:
    free = llm.generate([9, 9], SamplingParams(temperature=0, max_tokens=20), progress=False)[0].outputs[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[free[4]])
    stopped = llm.generate([9, 9], params, progress=False)[0].outputs[0]
    assert stopped.token_ids == free[: free.index(free[4]) + 1]
    assert stopped.finish_reason == "stop"
    seeded = SamplingParams(n=3, seed=4, max_tokens=10)
    first, second = (llm.generate([9, 9], seeded, progress=False)[0] for _ in range(2))
    tokens = [output.token_ids for output in first.outputs]
    assert tokens == [output.token_ids for output in second.outputs]
    assert len({tuple(ids) for ids in tokens}) == 3


def test_step_by_step_with_an_abort(llm: LLM) -> None:
    engine = llm.engine
    engine.add_request("long", [5, 6], SamplingParams(temperature=0, max_tokens=200))
    short = engine.add_request("short", [7, 8], SamplingParams(temperature=0, max_tokens=5))
    seen: list[int] = []
    while not short.finished:
        seen += [len(output.outputs[0].token_ids) for output in engine.step() if output.request_id == "short"]
    assert seen == sorted(seen)
    assert seen[-1] == 5
    with pytest.raises(ValueError, match="'long' is there already"):
        engine.add_request("long", [5])
    engine.abort_request("long")
    engine.abort_request("nobody")
    ended = [output for output in engine.step() if output.request_id == "long"]
    assert [output.outputs[0].finish_reason for output in ended] == ["abort"]
    assert not engine.has_unfinished_requests


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], []], "a prompt of 0 tokens"),
        ([[1] * 600], "a prompt of 600 tokens; it must have at least 1 and fewer than 512"),
        ([[400]], "token id 400 is outside the vocabulary of 320"),
        ([[-1]], "text or token ids"),
    ],
)
def test_a_prompt_that_does_not_fit_is_told(llm: LLM, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, progress=False)
    assert not llm.engine.has_unfinished_requests


def test_wrong_arguments_are_all_named() -> None:
    with pytest.raises(ValueError, match="top_p") as caught:
        SamplingParams(temperature=-1, top_p=0, max_tokens=0, stop=[""])
    for name in ("temperature", "top_p", "max_tokens", "stop"):
        assert f"{name}: " in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 2.5},
        {"seed": 1.5},
        {"n": True},
        {"top_k": 1.5},
        {"temperature": "x"},
        {"temperature": float("nan")},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"stop_token_ids": [-1]},
        {"min_tokens": 9, "max_tokens": 3},
    ],
)
def test_what_is_of_the_wrong_kind_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_params_must_be_as_many_as_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 params"):
        llm.generate([[1], [2]], [SamplingParams()], progress=False)
    with pytest.raises(TypeError, match="a prompt is text or token ids"):
        llm.generate([None], progress=False)  # type: ignore[arg-type]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match=r"config\.json: no such file"):
        LLM(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="executor 'ray' is not known"):
        LLMEngine(tmp_path, executor="ray")


def test_a_killed_worker_is_replaced(folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=300)
    with LLM(folder, executor="multiprocess", **SMALL) as llm:
        undisturbed = llm.generate([[5, 6], [7, 8]], params, progress=False)
        engine = llm.engine
        again = [engine.add_request(f"again-{ids}", ids, params) for ids in ([5, 6], [7, 8])]
        while len(again[0].outputs[0].token_ids) < 20:
            engine.step()
        (worker,) = psutil.Process().children()
        worker.kill()
        while engine.has_unfinished_requests:
            engine.step()
    for before, after in zip(undisturbed, again, strict=True):
        assert after.outputs[0].token_ids == before.outputs[0].token_ids


def test_the_shipped_model_and_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(embedded.path(), **SMALL) as llm:
        outputs = llm.generate(["def main() -> ", "import "], SamplingParams(max_tokens=8, seed=1))
    assert all(output.outputs[0].text for output in outputs)
    assert "2 of 2 requests · " in capsys.readouterr().err


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, penstock.local; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
