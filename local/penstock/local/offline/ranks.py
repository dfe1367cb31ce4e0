"""One call made by several ranks: rank 0 does the work, all return what it made.

Under torchrun every process runs the same script, and every one computes its share of each step; requests, texts and
tokens are rank 0's. ``LLM.generate`` ends in every rank with rank 0's outputs, or with its error, so that all scripts
go on alike.
"""

from collections.abc import Callable, Sequence

import msgspec

from penstock.executor.executor import Executor, ExecutorError
from penstock.executor.models.errors import one_line
from penstock.executor.uniproc import UniprocExecutor
from penstock.local.offline.outputs import RequestOutput

Prompt = str | Sequence[int]


class Outcome(msgspec.Struct, frozen=True):
    """How a call ended in rank 0."""

    outputs: list[RequestOutput] = []
    error: str | None = None
    kind: str = ""
    """The error's class."""


_RAISED = {error.__name__: error for error in (ValueError, TypeError)}
"""What a caller's own mistakes raise, in every rank alike."""
_decoder = msgspec.msgpack.Decoder(Outcome)


class Ranks:
    """Those of one executor, seen from this one."""

    def __init__(self, executor: Executor) -> None:
        """``executor`` has been started."""
        self._executor = executor if isinstance(executor, UniprocExecutor) and executor.ranks > 1 else None

    @property
    def rank(self) -> int:
        """This one; 0 does the work."""
        return 0 if self._executor is None else self._executor.rank

    def generate(self, prompts: Sequence[Prompt], work: Callable[[], list[RequestOutput]]) -> list[RequestOutput]:
        """In rank 0 ``work``; what it returned or raised, in all.

        Raises ExecutorError if another rank was given other ``prompts`` than rank 0, or if rank 0 is gone.
        """
        executor = self._executor
        if executor is None:
            return work()
        if executor.rank:
            return _taken(executor.await_note(), prompts, executor.rank)
        try:
            outputs = work()
        except BaseException as error:
            fault = str(error) if isinstance(error, (ExecutorError, *_RAISED.values())) else one_line(error)
            executor.publish(msgspec.msgpack.encode(Outcome(error=fault, kind=type(error).__name__)))
            raise
        executor.publish(msgspec.msgpack.encode(Outcome(outputs)))
        return outputs


def _taken(note: bytes, prompts: Sequence[Prompt], rank: int) -> list[RequestOutput]:
    outcome = _decoder.decode(note)
    if outcome.error is not None:
        if outcome.kind in _RAISED:
            raise _RAISED[outcome.kind](outcome.error)
        raise ExecutorError(f"rank 0: {outcome.error}")
    if not _same_prompts(outcome.outputs, prompts):
        raise ExecutorError(f"rank {rank} was given other prompts than rank 0: all ranks must make the same calls")
    return outcome.outputs


def _same_prompts(outputs: Sequence[RequestOutput], prompts: Sequence[Prompt]) -> bool:
    if len(outputs) != len(prompts):
        return False
    return all(
        output.prompt == prompt if isinstance(prompt, str) else output.prompt_token_ids == list(prompt)
        for output, prompt in zip(outputs, prompts, strict=True)
    )
