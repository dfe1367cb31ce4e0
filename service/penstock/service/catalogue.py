"""The models that the schedulers serve, as far as is known: also while a scheduler does not answer."""

import asyncio
from collections.abc import AsyncIterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from penstock.service import errors
from penstock.service.text.encode import Tokenizer
from penstock.service.text.errors import TokenizerFilesError
from penstock.service.text.files import MAX_FILE_BYTES, TokenizerFiles
from penstock.service.violations import Violations
from penstock.v1 import GetTokenizerResponse, Welcome

MAX_TOKENIZERS: Final = 8


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a scheduler says of its model."""

    name: str
    digest: str
    tokenizer_digest: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_model_tokens: int
    max_stop_ids: int
    max_waiting: int
    adapters: tuple[str, ...]

    @classmethod
    def of(cls, welcome: Welcome) -> "ModelFacts":
        """Those in `welcome`. Raises `ValueError` if it lacks limits, name or vocabulary."""
        limits = welcome.limits
        if limits is None or not welcome.model or not welcome.vocab_size:
            raise ValueError("the scheduler's welcome lacks limits, model name or vocabulary size")
        return cls(
            name=welcome.model,
            digest=welcome.model_digest,
            tokenizer_digest=welcome.tokenizer_digest,
            vocab_size=welcome.vocab_size,
            eos_ids=tuple(welcome.eos_ids),
            max_model_tokens=limits.max_model_tokens,
            max_stop_ids=limits.max_stop_ids,
            max_waiting=limits.max_waiting,
            adapters=tuple(adapter.name for adapter in welcome.adapters),
        )

    def same_model(self, other: "ModelFacts") -> bool:
        """Whether ids made for one mean the same to the other."""
        return (self.name, self.digest, self.tokenizer_digest) == (
            other.name,
            other.digest,
            other.tokenizer_digest,
        )


class Source(Protocol):
    """A scheduler as the catalogue sees it."""

    @property
    def replica(self) -> str:
        """Its name; its address before it said one."""
        ...

    @property
    def facts(self) -> ModelFacts | None:
        """The latest that it said; None before it was first reached."""
        ...

    @property
    def usable(self) -> bool:
        """Whether it takes requests now."""
        ...


class Catalogue:
    """Models by name, over all schedulers. Of several that disagree, one that is usable is believed."""

    __slots__ = ("_sources", "tokenizers")

    def __init__(self, sources: Sequence[Source], tokenizers: "Tokenizers") -> None:
        self._sources = sources
        self.tokenizers = tokenizers

    def models(self) -> Mapping[str, ModelFacts]:
        """All known models, by name."""
        found: dict[str, ModelFacts] = {}
        for source in sorted(self._sources, key=lambda source: not source.usable):
            if source.facts is not None:
                found.setdefault(source.facts.name, source.facts)
        return dict(sorted(found.items()))

    def replicas(self, model: str) -> Sequence[Source]:
        """The schedulers that serve it."""
        return [source for source in self._sources if source.facts is not None and source.facts.name == model]

    def resolve(self, name: str) -> ModelFacts:
        """The model that a request names; "" names the only one there is.

        Raises NOT_FOUND; UNAVAILABLE while a scheduler that was never reached may have it; INVALID_ARGUMENT
        for "" if there are several.
        """
        models = self.models()
        if name in models:
            return models[name]
        if not models or (name and any(source.facts is None for source in self._sources)):
            raise errors.no_scheduler()
        if name:
            raise errors.model_not_found()
        if len(models) > 1:
            violations = Violations()
            violations.add("model", "is empty, and there are several models")
            raise errors.invalid(violations)
        return next(iter(models.values()))

    def tokenizer(self, model: ModelFacts) -> Tokenizer:
        """The model's tokenizer. Raises UNAVAILABLE while it was not fetched yet."""
        tokenizer = self.tokenizers.get(model.tokenizer_digest)
        if tokenizer is None:
            raise errors.no_scheduler()
        return tokenizer


class Tokenizers:
    """Tokenizers by digest, fetched from the schedulers once; the latest `MAX_TOKENIZERS` are kept."""

    __slots__ = ("_building", "_loaded")

    def __init__(self) -> None:
        self._loaded: dict[str, Tokenizer] = {}
        self._building = asyncio.Lock()

    def get(self, digest: str) -> Tokenizer | None:
        """The tokenizer of that digest, if it was fetched."""
        return self._loaded.get(digest)

    async def fetch(self, digest: str, pieces: AsyncIterable[GetTokenizerResponse]) -> None:
        """Build the tokenizer from a scheduler's `pieces`, unless it is here by now.

        Raises `TokenizerFilesError` for files that are too large, not what `digest` names, or unreadable.
        """
        async with self._building:
            if digest in self._loaded:
                return
            files = await _gather(pieces)
            if files.digest != digest:
                raise TokenizerFilesError(f"the files have digest {files.digest}, not {digest}")
            self._loaded[digest] = await asyncio.to_thread(Tokenizer, files)
            while len(self._loaded) > MAX_TOKENIZERS:
                del self._loaded[next(iter(self._loaded))]


async def _gather(pieces: AsyncIterable[GetTokenizerResponse]) -> TokenizerFiles:
    contents: dict[str, bytearray] = {}
    async for piece in pieces:
        content = contents.setdefault(piece.name, bytearray())
        content += piece.data
        if len(content) > MAX_FILE_BYTES.get(piece.name, 0):
            raise TokenizerFilesError(f"{piece.name[:64]!r} is no tokenizer file, or larger than allowed")
    return TokenizerFiles({name: bytes(content) for name, content in contents.items()})
