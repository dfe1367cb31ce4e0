"""Gate → engine."""

import msgspec

from penstock.executor.step import Sampling


class SubmitSample(msgspec.Struct, frozen=True, array_like=True):
    """One continuation of a prompt."""

    handle: int
    """u32, unique among the sequences that the gate has not forgotten."""
    index: int
    """Its number in the request."""
    seed: int
    """64 bits."""
    delivered_ids: bytes = b""
    """u32: output that an earlier attempt delivered."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A new attempt, checked and admitted by the gate. Times are CLOCK_MONOTONIC nanoseconds; 0: none."""

    samples: tuple[SubmitSample, ...]
    prompt_ids: bytes
    """u32; at least one."""
    sampling: Sampling
    max_tokens: int
    """At least 1; prompt and output fit into the model's context."""
    arrival_ns: int
    min_tokens: int = 0
    stop_ids: bytes = b""
    """u32: beside the model's own."""
    ignore_eos: bool = False
    tenant: str = ""
    priority_class: int = 0
    adapter: str = ""
    cache_scope: bytes = b""
    deadline_ns: int = 0
    time_limit_ns: int = 0
    ttft_target_ns: int = 0
    tpot_target_ns: int = 0
    traced: bool = False
    """Whether to send span events for it."""


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """End sequences. Unknown handles are ignored; each known one is answered by a finish with CANCELLED."""

    handles: bytes
    """u32."""


class Drain(msgspec.Struct, frozen=True, array_like=True, tag="drain"):
    """The state becomes DRAINING; the gate admits nothing any more, what is there goes on."""


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """End the engine process now."""


Command = Submit | Cancel | Drain | Shutdown

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def encode(command: Command) -> bytes:
    """Encode a command for the ring."""
    return _encoder.encode(command)


def decode(data: bytes) -> Command:
    """Decode a command. Raises msgspec.DecodeError (ValidationError among them) for anything else."""
    return _decoder.decode(data)
