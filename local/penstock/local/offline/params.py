"""How the output of an offline request is chosen, and when it ends. Names are those that users of vLLM know."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.executor.step import MAX_STOP_IDS, Sampling, pack_u32

MAX_SAMPLES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Raises ValueError, naming everything that is wrong."""

    n: int = 1
    """Continuations of one prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all."""
    min_p: float = 0.0
    max_tokens: int | None = None
    """None: as many as the model has room for."""
    min_tokens: int = 0
    """Until so many are made, no token ends the output."""
    stop: Sequence[str] = field(default=())
    """The output ends before the first of these texts."""
    stop_token_ids: Sequence[int] = field(default=())
    """The output ends with the first of these, beside the model's own."""
    ignore_eos: bool = False
    """The model's own end tokens do not count."""
    seed: int | None = None
    """Makes sampling repeatable; None: drawn."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        wrong = [f"{name}: {getattr(self, name)!r:.60} {fault}" for name, fault in self._faults()]
        if wrong:
            raise ValueError("; ".join(wrong))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    def _faults(self) -> list[tuple[str, str]]:
        found = [(name, fault) for name, (holds, fault) in _RULES.items() if not holds(getattr(self, name))]
        if not found and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            found.append(("min_tokens", f"is more than max_tokens {self.max_tokens}"))
        return found

    def sampling(self) -> Sampling:
        """For the core."""
        return Sampling(
            temperature=float(self.temperature), top_p=float(self.top_p), top_k=max(0, self.top_k), min_p=self.min_p
        )

    def stop_ids(self) -> bytes:
        """For the core: u32."""
        return pack_u32(list(self.stop_token_ids))


def _number(low: float, high: float, *, open_low: bool = False) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return bool((low < value if open_low else low <= value) and value <= high)

    return holds


def _integer(low: int, high: int, *, or_none: bool = False) -> Callable[[Any], bool]:
    return lambda value: (value is None and or_none) or (type(value) is int and low <= value <= high)


def _are_texts(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(text, str) and text for text in value)


def _are_ids(value: Any) -> bool:
    holds = _integer(0, 2**32 - 1)
    return isinstance(value, Sequence) and len(value) <= MAX_STOP_IDS // 2 and all(holds(one) for one in value)


_MANY = 2**31 - 1
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (_integer(1, MAX_SAMPLES), f"is no whole number between 1 and {MAX_SAMPLES}"),
    "temperature": (_number(0, 1e6), "is no number between 0 and 1e6"),
    "top_p": (_number(0, 1, open_low=True), "is no number above 0 and at most 1"),
    "top_k": (_integer(-1, _MANY), "is no whole number of -1 or more"),
    "min_p": (_number(0, 1), "is no number between 0 and 1"),
    "max_tokens": (_integer(1, _MANY, or_none=True), "is no whole number of at least 1"),
    "min_tokens": (_integer(0, _MANY), "is no whole number of 0 or more"),
    "stop": (_are_texts, "is no list of texts, each of at least a character"),
    "stop_token_ids": (_are_ids, f"is no list of at most {MAX_STOP_IDS // 2} token ids"),
    "ignore_eos": (lambda value: type(value) is bool, "is neither True nor False"),
    "seed": (_integer(0, 2**64 - 1, or_none=True), "is no whole number between 0 and 2^64 - 1"),
}
