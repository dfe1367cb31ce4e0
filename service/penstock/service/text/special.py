"""The special tokens that a tokenizer's configuration names, read as `transformers` reads them."""

from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from penstock.service.text.files import TokenizerFiles


def named_special_tokens(files: TokenizerFiles) -> dict[str, str]:
    """`bos_token`, `eos_token` and every other `…_token` that the configuration gives a text.

    `special_tokens_map.json` overrides `tokenizer_config.json`, unless the latter lists its
    `added_tokens_decoder`.
    """
    return {
        name: text
        for name, value in _settings(files).items()
        if name.endswith("_token") and (text := _content(value)) is not None
    }


def mark_special_tokens(backend: Backend, files: TokenizerFiles) -> None:
    """Make special, in `backend`, the tokens that the configuration calls special.

    Of the additional ones, not those that `tokenizer.json` adds as ordinary tokens. A text that the vocabulary
    lacks is left out: `transformers` would invent an id for it that no checkpoint has.
    """
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    named = [text for text in named_special_tokens(files).values() if text not in added or not added[text].special]
    additional = [text for text in _additional_special_tokens(files) if text not in added]
    known = [text for text in named + additional if backend.token_to_id(text) is not None]
    backend.add_special_tokens([_as_special(text, added.get(text)) for text in known])


def _settings(files: TokenizerFiles) -> dict[str, Any]:
    config = files.json_object("tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return {**config, **files.json_object("special_tokens_map.json")}


def _additional_special_tokens(files: TokenizerFiles) -> Iterator[str]:
    settings = _settings(files)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key) or ()
        for value in listed.values() if isinstance(listed, dict) else listed:
            if (text := _content(value)) is not None:
                yield text


def _content(value: object) -> str | None:
    """A token is written as its text or as the fields of an `AddedToken`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _as_special(text: str, known: AddedToken | None) -> AddedToken:
    if known is None:
        return AddedToken(text, special=True, normalized=False)
    return AddedToken(
        text,
        special=True,
        normalized=known.normalized,
        lstrip=known.lstrip,
        rstrip=known.rstrip,
        single_word=known.single_word,
    )
