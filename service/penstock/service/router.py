"""Which scheduler gets an attempt."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from penstock.service import errors
from penstock.service.catalogue import ModelFacts
from penstock.v1 import Load


class Candidate(Protocol):
    """A scheduler as the router sees it."""

    @property
    def facts(self) -> ModelFacts | None:
        """The model that it serves; None before it was first reached."""
        ...

    @property
    def usable(self) -> bool:
        """Whether it is heard, serves and does not drain."""
        ...

    @property
    def load(self) -> Load:
        """The latest that it said."""
        ...

    @property
    def unreported(self) -> int:
        """Attempts given to it since, which `load` does not show."""
        ...


C = TypeVar("C", bound=Candidate)


class Router(Protocol):
    """A way to choose."""

    def choose(self, model: ModelFacts, prompt_tokens: int, candidates: Sequence[C]) -> C:
        """One of `candidates` that serves exactly `model`, is usable and not full.

        Raises UNAVAILABLE if none is usable, RESOURCE_EXHAUSTED if all that are usable are full.
        """
        ...


class LeastLoaded:
    """The one with the fewest sequences for each that it can run at once; of equals the first."""

    def choose(self, model: ModelFacts, prompt_tokens: int, candidates: Sequence[C]) -> C:
        """See `Router.choose`."""
        usable = [one for one in candidates if one.usable and one.facts and one.facts.same_model(model)]
        if not usable:
            raise errors.no_scheduler()
        open_ones = [one for one in usable if not _is_full(one)]
        if not open_ones:
            raise errors.queue_full()
        return min(open_ones, key=_fullness)


def _is_full(candidate: Candidate) -> bool:
    facts = candidate.facts
    return facts is not None and 0 < facts.max_waiting <= candidate.load.waiting


def _fullness(candidate: Candidate) -> float:
    load = candidate.load
    return (load.waiting + load.running + candidate.unreported) / max(load.max_running, 1)
