"""Engine → gate. Times are CLOCK_MONOTONIC nanoseconds."""

import enum

import msgspec

from penstock.executor.step import ModelInfo


class Finish(enum.IntEnum):
    """Why a sequence ended. The values are those of penstock.v1.FinishReason, which the engine does not import."""

    STOP = 1
    LENGTH = 2
    TIME_LIMIT = 4
    CANCELLED = 6
    DEADLINE = 100
    """The deadline passed before a step computed anything of it, or while it ran."""
    FAILED = 101
    """Its computation failed; ``detail`` says how."""


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A sequence ended; its handle is forgotten."""

    handle: int
    reason: int
    """A value of Finish."""
    tokens: int
    """Output tokens in all, delivered ones included."""
    arrival_ns: int
    started_ns: int
    """When the plan with its first row was submitted; 0: never."""
    first_token_ns: int
    """When its first token was known; 0: never."""
    finished_ns: int
    cached_tokens: int = 0
    preemptions: int = 0
    detail: str = ""


class Span(enum.IntEnum):
    """What a span event tells."""

    QUEUED = 1
    """From arrival, or preemption, to the plan that admitted it."""
    PREFILL = 2
    """One chunk, from its plan's submission to its result. ``number``: known ids computed."""
    DECODE = 3
    """From the first token after an admission to the end, or preemption. ``number``: tokens made."""
    PREEMPTED = 4
    """A moment. ``number``: tokens to compute again; ``cause``: by what."""
    FIRST_TOKEN = 5
    """A moment."""


class SpanEvent(msgspec.Struct, frozen=True, array_like=True):
    """Something about one traced sequence, for its trace."""

    kind: int
    """A value of Span."""
    handle: int
    start_ns: int
    end_ns: int
    number: int = 0
    step: int = 0
    """The plan that it belongs to; 0: none."""
    cause: str = ""


class StepSpan(msgspec.Struct, frozen=True, array_like=True):
    """A sampled step, for the traces of the sequences in it."""

    step: int
    start_ns: int
    """Submission."""
    end_ns: int
    """The result was taken."""
    plan_ns: int
    """Time to make the plan."""
    device_ns: int
    decode_rows: int
    prefill_rows: int
    sequences: int
    waiting: int
    handles: bytes
    """u32: the traced sequences in it."""
    launch_ns: int = 0
    """The worker's own time to apply the plan and to launch it."""
    repeat: int = 1
    """Steps of a burst."""


class Load(msgspec.Struct, frozen=True, array_like=True):
    """How full the engine is, and its counters since the start."""

    waiting: int
    waiting_tokens: int
    oldest_wait_ms: int
    running: int
    max_running: int
    free_blocks: int
    total_blocks: int
    step_us: int
    """Moving mean of the time between results while steps follow one another."""
    steps: int
    preemptions: int
    preemptions_in_flight: int
    """Of them, those of a sequence with a token in flight."""


class Started(msgspec.Struct, frozen=True, array_like=True, tag="started"):
    """The model is loaded; commands are taken from now on."""

    info: ModelInfo


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The engine cannot go on and ends its process."""

    message: str
    """One line for the operator."""


class LoadReport(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """Sent at 10 Hz, also when idle."""

    load: Load


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """All that one turn of the loop produced, in columns."""

    handles: bytes = b""
    """u32: one for each run of tokens."""
    offsets: bytes = b""
    """u32: number of the run's first token within its sequence's output, delivered ones included."""
    counts: bytes = b""
    """u8: tokens of the run, at least one."""
    ids: bytes = b""
    """u32: the runs' tokens, one run after another."""
    finished: tuple[Finished, ...] = ()
    spans: tuple[SpanEvent, ...] = ()
    steps: tuple[StepSpan, ...] = ()


Event = Started | Failed | LoadReport | Step

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(event: Event) -> bytes:
    """Encode an event for the ring."""
    return _encoder.encode(event)


def decode(data: bytes) -> Event:
    """Decode an event. Raises msgspec.DecodeError (ValidationError among them) for anything else."""
    return _decoder.decode(data)
