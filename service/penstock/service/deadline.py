"""Until when a call is wanted."""

import asyncio
from dataclasses import dataclass

_LONGER = 0.05
"""A deadline arrives longer than it was asked for, by this share of it at most.

grpc-core rounds it up to three digits (up to 1%), and sends one that it has sent before again where that is up to 3%
longer (TimeoutCompressorImpl::EncodeWith).
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
        """Of a call that arrives with `remaining_s` seconds left; if they are not positive, it has passed."""
        return cls(_now() + remaining_s, remaining_s * _LONGER + _ROAD_S)

    @property
    def passed(self) -> bool:
        """Whether it is over, so that nobody can want an answer any more."""
        return _now() >= self.at

    @property
    def passed_for_caller(self) -> bool:
        """Whether it may be over by the caller's clock, so that who leaves now has left for it.

        HTTP/2 has one cancel for a caller who has lost interest and for one whose time is over.
        """
        return _now() >= self.at - self.early_s


def _now() -> float:
    return asyncio.get_running_loop().time()
