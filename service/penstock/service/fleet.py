"""All schedulers of this service: what they serve, which one gets an attempt, whether any does."""

from collections.abc import Sequence

from penstock.service.catalogue import Catalogue, ModelFacts
from penstock.service.link import Link
from penstock.service.router import Router


class Fleet:
    """A fixed list of links. Their `run` tasks belong to whoever made them."""

    __slots__ = ("_links", "_router", "catalogue")

    def __init__(self, links: Sequence[Link], router: Router, catalogue: Catalogue) -> None:
        self._links = links
        self._router = router
        self.catalogue = catalogue

    @property
    def usable(self) -> bool:
        """Whether any scheduler takes attempts."""
        return any(link.usable for link in self._links)

    @property
    def in_flight(self) -> int:
        """Attempts that wait for a scheduler."""
        return sum(link.in_flight for link in self._links)

    def choose(self, model: ModelFacts, prompt_tokens: int) -> Link:
        """See `Router.choose`."""
        return self._router.choose(model, prompt_tokens, self._links)
