"""What the client gives back: plain, frozen values."""

import msgspec

from penstock.v1 import FinishReason


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Counted tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's tokens, those found in the prefix cache."""
    completion_tokens: int = 0


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time went at the scheduler, in seconds."""

    queue_s: float = 0.0
    """From arrival to the first step that computed a token of the request."""
    prefill_s: float = 0.0
    """From then to the first generated token."""
    decode_s: float = 0.0
    """From then to the last generated token."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream grew by."""

    text: str = ""
    """May be empty while text is held back, as the start of a stop text or half a character."""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    """Set in the last chunk."""
    stop: str | None = None
    """The stop text that ended the output, if one did."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    text: str
    """The output without stop text and special tokens."""
    token_ids: tuple[int, ...]
    """The output's tokens, the one that ended it included."""
    finish_reason: FinishReason
    stop: str | None = None
    """The stop text that ended the output, if one did."""
    usage: Usage
    timings: Timings
    seed: int
    """The seed that was used, the caller's or one that the service drew."""
    request_id: str
    model: str
    """The model that answered."""
    replica: str
    """The scheduler that served it."""
    trace_id: str = ""
    """32 hexadecimal digits; empty where the client does not trace."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A served model."""

    name: str
    digest: str
    tokenizer_digest: str
    vocab_size: int
    max_model_tokens: int
    """Most tokens of prompt and output together."""
    eos_token_ids: tuple[int, ...]
    chat: bool
    """Whether it has a chat template."""
    replicas: tuple[str, ...]
    """Names of the schedulers that serve it."""
    ready: bool
    """Whether one of them takes requests now."""
