"""A prompt that comes in parts."""

import asyncio
from collections.abc import Callable
from typing import Final

from penstock.rpc.errors import RpcError, invalid
from penstock.scheduler.gate.checks import CheckedSubmit, ModelLimits, Violations, check_piece
from penstock.v1 import SubmitPart

PARTS_SECONDS: Final = 10.0
"""From the beginning of a prompt to its last part."""


class Assembly:
    """One attempt whose prompt is not complete. It has its place in the queue already."""

    def __init__(
        self, checked: CheckedSubmit, arrival_ns: int, deadline_ns: int, give_back: Callable[[], None]
    ) -> None:
        """``give_back`` frees its place in the queue."""
        self.checked = checked
        self.arrival_ns = arrival_ns
        self.deadline_ns = deadline_ns
        self._give_back = give_back
        self._pieces = [checked.prompt_ids]
        self._tokens = len(checked.prompt_ids) // 4
        self._timer: asyncio.TimerHandle | None = None

    def expect_within(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back unless the prompt is complete by then."""
        self._timer = asyncio.get_running_loop().call_later(seconds, callback)

    @property
    def complete(self) -> bool:
        """Whether the whole prompt is there."""
        return self._tokens == self.checked.prompt_tokens

    def add(self, part: SubmitPart, limits: ModelLimits) -> None:
        """Append a part. Raises INVALID_ARGUMENT for one that is not next, too long, or bad."""
        violations: Violations = []
        if part.index != len(self._pieces):
            violations.append(("index", f"is {part.index} where {len(self._pieces)} is next"))
        tokens = check_piece(part.prompt_ids, limits, violations)
        if not tokens and not violations:
            violations.append(("prompt_ids", "is empty"))
        if self._tokens + tokens > self.checked.prompt_tokens:
            violations.append(("prompt_ids", "holds more than prompt_tokens"))
        if violations:
            raise invalid(violations)
        self._pieces.append(part.prompt_ids)
        self._tokens += tokens

    def finish(self) -> bytes:
        """The prompt, u32; its place in the queue passes to whoever takes it."""
        self._stop_timer()
        return b"".join(self._pieces)

    def drop(self) -> None:
        """It will not become an attempt."""
        self._stop_timer()
        self._give_back()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def too_slow() -> RpcError:
    """INVALID_ARGUMENT: the prompt did not come."""
    return invalid([("prompt_ids", f"the rest of the prompt did not come within {PARTS_SECONDS:g} s")])
