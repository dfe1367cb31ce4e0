"""`Tokenizer`: text to ids and back, for one model, with the conventions of `transformers` and without it."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from penstock.service.text.detokenize import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    IncrementalDetokenizer,
    WindowDetokenizer,
)
from penstock.service.text.errors import PromptTooLong, TemplateError, TokenizerFilesError
from penstock.service.text.files import TokenizerFiles
from penstock.service.text.pieces import (
    ByteFallbackPieces,
    ByteLevelPieces,
    UnknownDecoder,
    special_ids,
    tabulate,
)
from penstock.service.text.special import mark_special_tokens, named_special_tokens
from penstock.service.text.template import ChatTemplate

NORMALIZER_SLACK: Final = 4
"""A normalizer may shorten the text before it is cut into tokens: NFC makes one character of a few."""


class Tokenizer:
    """Immutable once built, and safe to use from several threads.

    Building takes up to a second for a large vocabulary, so not on an event loop. Special tokens are placed
    around a text by the post-processor in `tokenizer.json` and by nothing else: `add_bos_token` in
    `tokenizer_config.json` is without effect when a `tokenizer.json` exists, as in `transformers`. Truncation
    and padding are off. Raises `TokenizerFilesError`.
    """

    __slots__ = (
        "_backend",
        "_pieces",
        "_template",
        "bos_id",
        "digest",
        "eos_id",
        "max_token_chars",
        "special_ids",
        "special_tokens",
        "vocab_size",
    )

    def __init__(self, files: TokenizerFiles) -> None:
        self.digest: Final = files.digest
        self.special_tokens: Final[Mapping[str, str]] = named_special_tokens(files)
        """`bos_token`, `eos_token` … by name: what a template may print."""
        self._backend = _load(files)
        self._pieces = _tabulate(self._backend)
        self._template = _template(files)
        self.special_ids: Final = special_ids(self._backend)
        self.vocab_size: Final = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        """Every id of this tokenizer is below it; the model may have more rows."""
        self.bos_id: Final = self._named_id("bos_token")
        self.eos_id: Final = self._named_id("eos_token")
        self.max_token_chars: Final = None if self._pieces is None else self._pieces.max_token_chars
        """The most characters that one token can stand for; None if that cannot be known."""

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> "array[int]":
        """The ids of `text`, as `array('I')`. The interpreter lock is released meanwhile."""
        encodings = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return array("I", encodings[0].ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> "array[int]":
        """Render `messages` and encode them. The template alone writes special tokens: none comes twice.

        `options` are those of `ChatTemplate.render`. Raises `TemplateError`.
        """
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text of a conversation. Raises `TemplateError`."""
        if self._template is None:
            raise TemplateError("the model has no chat template")
        if isinstance(self._template, TemplateError):
            raise TemplateError(str(self._template))
        return self._template.render(messages, special_tokens=self.special_tokens, **options)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; ids beyond the vocabulary have none."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> IncrementalDetokenizer:
        """For one sample that continues `prompt_ids`: the fastest kind that is right for this tokenizer."""
        match self._pieces:
            case ByteLevelPieces():
                return ByteLevelDetokenizer(self._pieces, prompt_ids, skip_special_tokens=skip_special_tokens)
            case ByteFallbackPieces():
                return ByteFallbackDetokenizer(self._pieces, prompt_ids, skip_special_tokens=skip_special_tokens)
            case None:
                return self.window_detokenizer(prompt_ids, skip_special_tokens=skip_special_tokens)

    def window_detokenizer(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> WindowDetokenizer:
        """The detokenizer that asks the library, for decoders that have no table."""
        backend, special = self._backend, self.special_ids

        def decode(ids: Sequence[int]) -> str:
            return backend.decode(ids, skip_special_tokens=skip_special_tokens) if ids else ""

        def kept(token: int) -> bool:
            if skip_special_tokens and token in special:
                return False
            return backend.id_to_token(token) is not None

        return WindowDetokenizer(decode, kept, prompt_ids)

    def check_length(self, text: str, max_tokens: int) -> None:
        """Raise `PromptTooLong` if `text` cannot fit `max_tokens`, judged by its length alone.

        Added tokens that swallow the white space beside them are not reckoned with: megabytes of it are
        refused too.
        """
        if self.max_token_chars is None:
            return
        slack = 1 if self._backend.normalizer is None else NORMALIZER_SLACK
        max_chars = max_tokens * self.max_token_chars * slack
        if len(text) > max_chars:
            raise PromptTooLong(len(text), max_chars)

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


def _load(files: TokenizerFiles) -> Backend:
    try:
        backend = Backend.from_buffer(files.contents["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception
        raise TokenizerFilesError(f"tokenizer.json is unreadable: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    mark_special_tokens(backend, files)
    return backend


def _tabulate(backend: Backend) -> ByteLevelPieces | ByteFallbackPieces | None:
    try:
        return tabulate(backend)
    except UnknownDecoder:
        return None


def _template(files: TokenizerFiles) -> ChatTemplate | TemplateError | None:
    """A template that does not compile fails the chats, not the model."""
    try:
        return ChatTemplate.from_files(files)
    except TemplateError as error:
        return error
