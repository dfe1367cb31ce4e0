"""What comes out of the engine in an asyncio program."""

from __future__ import annotations

import asyncio
import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from penstock.local import LLM, AsyncLLM, RequestOutput, SamplingParams
from support.async_engine import SMALL, last


async def test_outputs_are_those_of_the_synchronous_engine(folder: Path) -> None:
    prompts: list[str | list[int]] = [[5 + number, 9, 30] for number in range(10)]
    prompts += ["hello there", "x" * 300, "long enough for another thread " * 20]
    params = [SamplingParams(seed=number, max_tokens=4 + number) for number in range(9)]
    params += [SamplingParams(temperature=0, max_tokens=30, n=2), SamplingParams(seed=3, n=3, max_tokens=9)]
    with LLM(folder, **SMALL) as llm:
        free = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=30), progress=False)[0].outputs[0]
        params += [SamplingParams(temperature=0, max_tokens=40, stop=free.text[9:12])] * 2
        wanted = [output.outputs for output in llm.generate(prompts, params, progress=False)]
    async with AsyncLLM(folder, **SMALL) as llm_:
        made = await asyncio.gather(*(last(llm_, *one) for one in zip(prompts, params, strict=True)))
    assert made == wanted


async def test_fifty_streams_share_six_slots(folder: Path) -> None:
    prompts = [[number, 9, 30] for number in range(50)]
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM(folder, **SMALL) as llm:
        wanted = [output.outputs for output in llm.generate(prompts, params, progress=False)]
    async with AsyncLLM(folder, **SMALL) as llm_:
        assert await asyncio.gather(*(last(llm_, prompt, params) for prompt in prompts)) == wanted


async def test_outputs_grow_and_never_change_afterwards(folder: Path) -> None:
    async with AsyncLLM(folder, **SMALL) as llm:
        seen: list[tuple[RequestOutput, RequestOutput]] = []
        async for output in llm.generate("hello", SamplingParams(n=2, seed=1, max_tokens=40), "one"):
            seen.append((output, copy.deepcopy(output)))
        assert all(output == before for output, before in seen)
        for (earlier, _), (later, _) in itertools.pairwise(seen):
            for less, more in zip(earlier.outputs, later.outputs, strict=True):
                assert more.text.startswith(less.text)
                assert more.token_ids[: len(less.token_ids)] == less.token_ids
            assert earlier.outputs != later.outputs
        assert [output.finished for output, _ in seen] == [False] * (len(seen) - 1) + [True]
        final = seen[-1][0]
        assert llm.tokenizer is not None
        prompt_ids = llm.tokenizer.encode("hello").tolist()
        assert (final.request_id, final.prompt, final.prompt_token_ids) == ("one", "hello", prompt_ids)
        assert final.first_token_s is not None
        assert final.finished_s is not None


async def test_deltas_add_up(folder: Path) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=30, stop=["e", "4"])
    async with AsyncLLM(folder, **SMALL) as llm:
        whole = await last(llm, [5, 6], params)
        assert len({len(one.token_ids) for one in whole}) > 1  # they end at different times
        deltas = [output async for output in llm.generate([5, 6], params, delta=True)]
    for index, one in enumerate(whole):
        parts = [delta.outputs[index] for delta in deltas]
        assert "".join(part.text for part in parts) == one.text
        assert [token for part in parts for token in part.token_ids] == one.token_ids
        ended = deltas[-1].outputs[index]
        assert (ended.finish_reason, ended.stop_reason) == (one.finish_reason, one.stop_reason)
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]


def test_the_example_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "offline.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AsyncLLM" in block)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, "offline.md", "exec"), names)
    asyncio.run(names["main"]())
    finished = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" True")]
    assert sorted(line.split("' ")[0] for line in finished) == ["'class Stack:", "'def fibonacci(n):"]
