"""Many prompts at once, offline: ``LLM(model).generate(prompts, SamplingParams(...))``."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self, TextIO

from penstock.executor.executor import ExecutorError
from penstock.local.offline.engine import LLMEngine
from penstock.local.offline.outputs import RequestOutput
from penstock.local.offline.params import SamplingParams
from penstock.local.offline.ranks import Prompt, Ranks

_REDRAW_S: Final = 0.2


class LLM:
    """A model and its engine. Takes what :class:`LLMEngine` takes; close it, or use it in a ``with``."""

    def __init__(self, model: str | Path, **settings: Any) -> None:
        """Load the model of a local folder."""
        self.engine = LLMEngine(model, **settings)
        self._ranks = Ranks(self.engine.executor)
        self._requests = 0

    @property
    def rank(self) -> int:
        """This process among those that torchrun started; 0 if there is one."""
        return self._ranks.rank

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue all prompts; the outputs are in their order.

        ``prompts``: texts or token ids, one or many; ``params``: for all of them, or one for each. A prompt that fails
        in computation has ``finish_reason`` "error"; the others do not notice. Raises ValueError, before anything is
        computed, if a prompt does not fit or their numbers differ; TypeError for what is no prompt.

        Those that may make most tokens begin first, so that the last steps are not of a few that came late (Graham
        1969, "Bounds on multiprocessing timing anomalies").

        Under torchrun every rank must make the same calls. Rank 0's prompts and params count, and the call ends in
        every rank with rank 0's outputs or its error; ExecutorError if prompts differ or a rank is lost.
        """
        many = _listed(prompts)
        return self._ranks.generate(many, lambda: self._generate(many, params, progress))

    def _generate(
        self, many: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, progress: bool
    ) -> list[RequestOutput]:
        chosen = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(chosen) != len(many):
            raise ValueError(f"{len(many)} prompts and {len(chosen)} params")
        outputs: dict[int, RequestOutput] = {}
        first, self._requests = self._requests + 1, self._requests + len(many)
        try:
            for number in longest_first([one.max_tokens if one else None for one in chosen]):
                request_id = f"generate-{first + number}"
                outputs[number] = self.engine.add_request(request_id, many[number], chosen[number])
            self._run(_Bar(len(many), sys.stderr) if progress else None)
        except BaseException:
            with suppress(ExecutorError):  # if it has failed, the first error is the one to tell
                self._abort(outputs.values())
            raise
        return [outputs[number] for number in range(len(many))]

    def chat(
        self,
        conversations: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue conversations, each a list of messages, through the model's chat template. Else as generate.

        Raises TemplateError if the template refuses one, ValueError if the model has no tokenizer.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ValueError("the model has no tokenizer")
        first = conversations[0] if conversations else ()
        many: Any = [conversations] if isinstance(first, Mapping) else conversations
        return self.generate([tokenizer.encode_chat(messages).tolist() for messages in many], params, progress=progress)

    def _run(self, bar: "_Bar | None") -> None:
        engine = self.engine
        while engine.has_unfinished_requests:
            changed = engine.turn()
            if bar is not None:
                bar.count(len(changed), sum(sample.request.finished for sample in changed))
        if bar is not None:
            bar.end()

    def _abort(self, outputs: Iterable[RequestOutput]) -> None:
        """Leave the engine as it was before: its next call must not find these."""
        for output in outputs:
            self.engine.abort_request(output.request_id)
        while self.engine.has_unfinished_requests:
            self.engine.turn()

    def close(self) -> None:
        """End the engine. Idempotent."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def longest_first(max_tokens: Sequence[int | None]) -> list[int]:
    """The places of requests in the order to begin them: most tokens first, equals as they came. None: no limit."""
    return sorted(range(len(max_tokens)), key=lambda number: -(max_tokens[number] or sys.maxsize))


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    many = list(prompts)
    if many and all(isinstance(one, int) for one in many):
        return [many]  # type: ignore[list-item]
    for one in many:
        if not isinstance(one, str | Sequence):
            raise TypeError(f"a prompt is text or token ids, not {one!r:.60}")
    return many  # type: ignore[return-value]


class _Bar:
    """How far it is, on stderr: redrawn on a terminal, a line at the end elsewhere."""

    def __init__(self, requests: int, stream: TextIO) -> None:
        self._requests, self._stream = requests, stream
        self._tokens = self._ended = 0
        self._began = time.monotonic()
        self._drawn = 0.0

    def count(self, tokens: int, ended: int) -> None:
        self._tokens += tokens
        self._ended += ended
        now = time.monotonic()
        if self._stream.isatty() and now - self._drawn > _REDRAW_S:
            self._drawn = now
            self._stream.write(f"\r{self._line(now)}")
            self._stream.flush()

    def end(self) -> None:
        self._ended = self._requests
        self._stream.write(("\r" if self._stream.isatty() else "") + self._line(time.monotonic()) + "\n")

    def _line(self, now: float) -> str:
        seconds = max(now - self._began, 1e-9)
        done = min(self._ended, self._requests)
        return f"{done} of {self._requests} requests · {self._tokens / seconds:,.0f} tokens/s · {seconds:.1f} s"
