"""From the client's arguments to request messages; shared by the async and the sync client."""

from collections.abc import Mapping, Sequence
from operator import index
from typing import TypedDict

from penstock.v1 import (
    Chat,
    ChatMessage,
    ContentPart,
    DetokenizeRequest,
    GenerateRequest,
    Sampling,
    TokenIds,
    TokenizeRequest,
)

Message = ChatMessage | Mapping[str, str]
"""One turn of a conversation; a mapping has `role`, `content` and, if wished, `name`."""

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation."""

_MESSAGE_KEYS = frozenset({"role", "content", "name"})


class Options(TypedDict, total=False):
    """How to generate. What is left out, or None, takes the default of `penstock.v1.Sampling`."""

    model: str
    """Name of a served model; may be left out where there is one only."""
    max_tokens: int | None
    """Generate at most this many tokens. Default: as many as fit into the model's context."""
    min_tokens: int | None
    """Do not end before this many."""
    temperature: float | None
    """0 is greedy."""
    top_p: float | None
    top_k: int | None
    seed: int | None
    """Makes sampling repeatable; 64 bits."""
    stop: str | Sequence[str]
    """End when the output contains one of these texts, which is cut off."""
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    request_id: str
    """A label: logged, traced and returned."""
    timeout_s: float | None
    """The deadline of this call, instead of the client's."""


def generate_request(prompt: Prompt, options: Options) -> GenerateRequest:
    """The message that asks for it.

    Raises TypeError for a prompt of no known form and for an unknown option. Whether the values make sense
    is for the service to say.
    """
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"unknown option {min(unknown)!r}")
    return GenerateRequest(
        model=options.get("model", ""),
        request_id=options.get("request_id", ""),
        sampling=_sampling(options),
        text=prompt if isinstance(prompt, str) else None,
        chat=_chat(prompt),
        token_ids=_token_ids(prompt),
    )


def tokenize_request(prompt: str | Sequence[Message], model: str, special: bool | None) -> TokenizeRequest:
    """The message that asks for the token ids of text or a conversation. Raises TypeError."""
    text = prompt if isinstance(prompt, str) else None
    chat = _chat(prompt)
    if text is None and chat is None:
        raise TypeError("only text and conversations have token ids to ask for")
    return TokenizeRequest(model=model, add_special_tokens=special, text=text, chat=chat)


def detokenize_request(token_ids: Sequence[int], model: str, skip_special: bool | None) -> DetokenizeRequest:
    """The message that asks for the text of token ids."""
    return DetokenizeRequest(model=model, skip_special_tokens=skip_special, token_ids=list(token_ids))


def _sampling(options: Options) -> Sampling:
    stop = options.get("stop", ())
    return Sampling(
        temperature=options.get("temperature"),
        top_p=options.get("top_p"),
        top_k=options.get("top_k"),
        seed=options.get("seed"),
        max_tokens=options.get("max_tokens"),
        min_tokens=options.get("min_tokens"),
        stop=[stop] if isinstance(stop, str) else list(stop),
        stop_token_ids=list(options.get("stop_token_ids", ())),
        ignore_eos=options.get("ignore_eos", False),
    )


def _chat(prompt: Prompt) -> Chat | None:
    if isinstance(prompt, str) or not prompt:
        return None
    messages = [item for item in prompt if isinstance(item, ChatMessage | Mapping)]
    if not messages:
        return None
    if len(messages) != len(prompt):
        raise TypeError("a conversation consists of messages only")
    return Chat(messages=[_message(message) for message in messages])


def _message(message: Message) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    if unknown := message.keys() - _MESSAGE_KEYS:
        raise TypeError(f"unknown key {min(unknown)!r} in a message")
    try:
        content = ContentPart(text=message["content"])
        return ChatMessage(role=message["role"], name=message.get("name", ""), content=[content])
    except KeyError as error:
        raise TypeError(f"a message lacks {error}") from None


def _token_ids(prompt: Prompt) -> TokenIds | None:
    """The prompt as ids; None if it is text or a conversation."""
    if isinstance(prompt, bytes | bytearray):
        raise TypeError("a prompt is text, token ids or messages, not bytes")
    if isinstance(prompt, str) or _chat(prompt) is not None:
        return None
    return TokenIds(ids=[index(item) for item in prompt])  # type: ignore[arg-type]
