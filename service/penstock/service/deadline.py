"""Until when a call is wanted."""

import asyncio
from dataclasses import dataclass

_LONGER = 0.05
"""A deadline arrives longer than it was asked for, by this share of it at most.

gRPC sends two or three digits of it, rounded up (PROTOCOL-HTTP2, "Timeout"), and grpc-core sends one again that it has
sent before if that is up to 3% longer.
"""
_ROAD_S = 0.02
"""And it begins later, by the time that the call was on its way, with a busy event loop at its end."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """The caller's deadline, by the running loop's clock."""

    at: float
    early_s: float
    """The caller's own clock may end the call so many seconds before `at`."""

    @classmethod
    def after(cls, remaining_s: float) -> "Deadline":
        """The deadline of a call that has `remaining_s` seconds left as it arrives, none if it is not positive."""
        return cls(_now() + remaining_s, remaining_s * _LONGER + _ROAD_S)

    @property
    def passed(self) -> bool:
        """Whether it is over, so that nobody can want an answer any more."""
        return _now() >= self.at

    @property
    def ends_callers(self) -> bool:
        """Whether a caller who leaves now leaves for the deadline: HTTP/2 has one cancel for both."""
        return _now() >= self.at - self.early_s


def _now() -> float:
    return asyncio.get_running_loop().time()
