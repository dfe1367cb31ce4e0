"""How the output of an offline request is chosen, and when it ends. Names are those that users of vLLM know."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.executor.step import MAX_STOP_IDS, Sampling, pack_u32

MAX_SAMPLES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Raises ValueError, naming everything that is wrong, and TypeError for what is of the wrong type."""

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
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        wrong = [f"{name}: {fault}" for name, fault in self._faults()]
        if wrong:
            raise ValueError("; ".join(wrong))

    def _faults(self) -> list[tuple[str, str]]:
        return [
            (name, f"{getattr(self, name)!r} {fault}")
            for name, (holds, fault) in _RULES.items()
            if not holds(getattr(self, name))
        ]

    def sampling(self) -> Sampling:
        """For the core."""
        return Sampling(
            temperature=float(self.temperature), top_p=float(self.top_p), top_k=max(0, self.top_k), min_p=self.min_p
        )

    def stop_ids(self) -> bytes:
        """For the core: u32."""
        return pack_u32(list(self.stop_token_ids))


def _between(low: float, high: float, *, open_low: bool = False) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        return math.isfinite(value) and (low < value if open_low else low <= value) and value <= high

    return holds


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (_between(1, MAX_SAMPLES), f"is not between 1 and {MAX_SAMPLES}"),
    "temperature": (_between(0, 1e6), "is not between 0 and 1e6"),
    "top_p": (_between(0, 1, open_low=True), "is not above 0 and at most 1"),
    "top_k": (_between(-1, 2**31 - 1), "is not -1 or more"),
    "min_p": (_between(0, 1), "is not between 0 and 1"),
    "max_tokens": (lambda value: value is None or value >= 1, "is not at least 1"),
    "min_tokens": (_between(0, 2**31 - 1), "is not 0 or more"),
    "stop": (lambda value: all(isinstance(text, str) and text for text in value), "has something that is no text"),
    "stop_token_ids": (
        lambda value: len(value) <= MAX_STOP_IDS // 2 and all(type(one) is int and 0 <= one < 2**32 for one in value),
        f"are not at most {MAX_STOP_IDS // 2} token ids",
    ),
    "seed": (lambda value: value is None or 0 <= value < 2**64, "is not between 0 and 2^64 - 1"),
}
