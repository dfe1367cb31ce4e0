"""Chat templates, rendered as `transformers` renders them, within bounds."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2

from penstock.service.text.errors import TemplateError, TemplateRefused, TokenizerFilesError
from penstock.service.text.files import TokenizerFiles
from penstock.service.text.sandbox import BUDGET, Budget, RefusedByTemplate, TemplateEnvironment

MAX_MESSAGE_CHARS: Final = 500


def _local_time() -> datetime:
    return datetime.now().astimezone()


class ChatTemplate:
    """A compiled template; immutable and safe to use from several threads.

    `tool_use` is a second template, taken when a conversation has tools. A rendering ends after `max_seconds`
    at the latest, whatever the template does, and has at most `max_chars` characters. Raises `TemplateError`
    if it does not compile.
    """

    __slots__ = ("_default", "_max_chars", "_max_seconds", "_tool_use")

    def __init__(
        self,
        source: str,
        tool_use: str | None = None,
        *,
        max_seconds: float = 2.0,
        max_chars: int = 1 << 24,
        now: Callable[[], datetime] = _local_time,
    ) -> None:
        environment = TemplateEnvironment(max_chars=max_chars, now=now)
        self._max_seconds = max_seconds
        self._max_chars = max_chars
        self._default = _compile(environment, source)
        self._tool_use = self._default if tool_use is None else _compile(environment, tool_use)

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> "ChatTemplate | None":
        """The model's template: `chat_template.jinja` before `chat_template` in `tokenizer_config.json`.

        None if it has none. Raises `TemplateError` for one that is no text or does not compile.
        """
        try:
            source = files.text("chat_template.jinja")
        except TokenizerFilesError as error:
            raise TemplateError(str(error)) from error
        found = source or files.json_object("tokenizer_config.json").get("chat_template")
        if isinstance(found, list):
            named = _named(found)
            return cls(named["default"], named.get("tool_use"))
        return None if found is None else cls(_text(found))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Messages and tools are plain JSON values; keys whose value is None are left out. `variables` are the
        caller's further ones, and win over `special_tokens`. Raises `TemplateError`, and of it
        `TemplateRefused` when the template itself rejects the conversation.
        """
        if not messages:
            raise TemplateError("a conversation has at least one message")
        values = {
            **special_tokens,
            **(variables or {}),
            "messages": [_without_none(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._render(self._default if tools is None else self._tool_use, values)

    def _render(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        values[BUDGET] = Budget(max_seconds=self._max_seconds, max_chars=self._max_chars)
        try:
            return self._join(template, values)
        except RefusedByTemplate as error:
            raise TemplateRefused(_clean(error)) from error
        except Exception as error:  # a template is a program: it may fail in any way
            raise TemplateError(f"the chat template failed: {_clean(error)}") from error

    def _join(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        """Gather the pieces, whose literal text the budget has not seen."""
        pieces, chars = [], 0
        for piece in template.generate(values):
            pieces.append(piece)
            chars += len(piece)
            if chars > self._max_chars:
                raise TemplateError(f"it made more than {self._max_chars} characters")
        return "".join(pieces)


def _compile(environment: jinja2.Environment, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is wrong in line {error.lineno}: {_clean(error)}") from error
    except (RecursionError, SyntaxError, MemoryError) as error:
        raise TemplateError(f"the chat template cannot be compiled: {_clean(error)}") from error


def _named(entries: list[Any]) -> dict[str, str]:
    """The texts of a list of `{"name": …, "template": …}`, of which one is named `default`."""
    try:
        named = {str(entry["name"]): _text(entry["template"]) for entry in entries}
    except (KeyError, TypeError) as error:
        raise TemplateError("the list of chat templates is malformed") from error
    if "default" not in named:
        raise TemplateError(f"of the chat templates {sorted(named)} none is the default")
    return named


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TemplateError("the chat template is not a text")
    return value


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    """Clients send `content: null`; templates can handle a missing key, but print None."""
    return {key: value for key, value in message.items() if value is not None}


def _clean(error: Exception) -> str:
    """One line, of bounded length."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"
