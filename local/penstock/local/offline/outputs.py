"""What comes of an offline request."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class CompletionOutput:
    """One continuation, as far as it is made."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    """Empty for a model without a tokenizer."""
    finish_reason: FinishReason | None = None
    """None: there is more to come."""
    stop_reason: str | None = None
    """The stop text that ended it."""
    error: str | None = None
    """Why it failed."""


@dataclass(slots=True)
class RequestOutput:
    """A request and its continuations. Times are seconds since its arrival; None: has not happened."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    first_token_s: float | None = None
    finished_s: float | None = None

    @property
    def finished(self) -> bool:
        """Whether all continuations have ended."""
        return all(output.finish_reason is not None for output in self.outputs)
