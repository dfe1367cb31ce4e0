"""Channels with the options that every client of ours wants."""

from collections.abc import Sequence

import grpc

Option = tuple[str, str | int]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""What a client takes in one message: a chunk of a tokenizer, a prompt's log-probabilities."""

_OPTIONS: tuple[Option, ...] = (
    # Two channels to one address are two connections: a wedged one is dropped without hurting its neighbour.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Our calls are not retried behind our back: whether a request may be sent twice is not the transport's to say.
    ("grpc.enable_retries", 0),
)


def open_channel(
    address: str, *, credentials: grpc.ChannelCredentials | None = None, options: Sequence[Option] = ()
) -> grpc.aio.Channel:
    """A channel for asyncio; it connects on first use. The caller closes it. ``options`` override ours."""
    merged = _merged(options)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=merged)
    return grpc.aio.secure_channel(address, credentials, options=merged)


def open_sync_channel(
    address: str, *, credentials: grpc.ChannelCredentials | None = None, options: Sequence[Option] = ()
) -> grpc.Channel:
    """A channel for threads; it connects on first use. The caller closes it. ``options`` override ours."""
    merged = _merged(options)
    if credentials is None:
        return grpc.insecure_channel(address, options=merged)
    return grpc.secure_channel(address, credentials, options=merged)


def _merged(options: Sequence[Option]) -> list[Option]:
    return list((dict(_OPTIONS) | dict(options)).items())
