"""The Python client, async and sync.

    with Client("127.0.0.1:50051") as client:
        for chunk in client.stream("def fibonacci(n):", max_tokens=64):
            print(chunk.text, end="")

Every call has a deadline and fails with `RpcError`. Where the program traces with OpenTelemetry, each call is a span
and the service continues its trace.
"""

from penstock.client.asynchronous import AsyncClient
from penstock.client.request import Message, Options, Prompt
from penstock.client.stream import AsyncStream, Stream
from penstock.client.synchronous import Client
from penstock.client.types import Chunk, Completion, Model, Timings, Usage
from penstock.rpc.errors import RpcError
from penstock.rpc.tls import channel_credentials
from penstock.v1 import ChatMessage, ErrorReason, FinishReason

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatMessage",
    "Chunk",
    "Client",
    "Completion",
    "ErrorReason",
    "FinishReason",
    "Message",
    "Model",
    "Options",
    "Prompt",
    "RpcError",
    "Stream",
    "Timings",
    "Usage",
    "channel_credentials",
]
