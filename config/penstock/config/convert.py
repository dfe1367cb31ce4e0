"""From the text of a flag or variable to a typed value."""

import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from penstock.config.fields import Setting

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


class Unfit(ValueError):
    """A text that is no value of its setting; the message says why, without naming the setting."""


def to_value(setting: Setting, texts: list[str]) -> object:
    """The value that the texts (several only for a repeated setting) stand for.

    An empty text is None for an optional setting. Raises Unfit; its message does not show the text of a
    secret.
    """
    if setting.optional and texts == [""]:
        return None
    if not setting.repeated:
        return _check(setting, _one(setting, texts[-1]))
    parts = [part.strip() for text in texts for part in text.split(",")]
    return _check(setting, tuple(_one(setting, part) for part in parts if part))


def _one(setting: Setting, text: str) -> object:
    try:
        value = _parse(setting.plain, setting.item, text)
    except (ValueError, msgspec.ValidationError) as error:
        shown = "" if setting.is_secret else f", got {text!r}"
        raise Unfit(_reason(error) + shown) from None
    return value


def _parse(plain: Any, item: Any, text: str) -> object:
    if plain is Path:
        return _path(text)
    if plain is bool:
        return _truth(text)
    if get_origin(plain) is Literal:
        return _choice(get_args(plain), text)
    number = _number(plain, text)
    return msgspec.convert(number, item)


def _number(plain: Any, text: str) -> object:
    if plain is int:
        return _integer(text)
    if plain is float:
        return _finite(text)
    return text


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("expected a whole number") from None


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("expected a number") from None
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _truth(text: str) -> bool:
    word = text.lower()
    if word not in _TRUE | _FALSE:
        raise ValueError("expected true or false")
    return word in _TRUE


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError("expected a path")
    return Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(text)


def _choice(choices: tuple[object, ...], text: str) -> object:
    for choice in choices:
        if str(choice) == text:
            return choice
    raise ValueError(f"expected one of {', '.join(str(choice) for choice in choices)}")


def _check(setting: Setting, value: object) -> object:
    """Apply the constraints that stand on the whole (a tuple's length, `Annotated[int | None, …]`)."""
    try:
        return msgspec.convert(value, setting.annotation, dec_hook=_keep_path)
    except msgspec.ValidationError as error:
        raise Unfit(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = str(error).replace("`", "")
    return text[:1].lower() + text[1:]


def _keep_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, Path):
        return value
    raise NotImplementedError(f"{kind!r} is no type of a setting")
