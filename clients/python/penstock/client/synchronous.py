"""The client for threads."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc
from opentelemetry.trace import Tracer

from penstock.client import fold
from penstock.client.connection import DEFAULT_TIMEOUT_S, Connection
from penstock.client.request import Message, Options, Prompt, detokenize_request, tokenize_request
from penstock.client.stream import Stream
from penstock.client.types import Completion, Model
from penstock.rpc.channel import open_sync_channel
from penstock.rpc.stubs import SyncGenerationStub, SyncModelStub
from penstock.v1 import ListModelsRequest, StreamRequest


class Client:
    """Talks to one service. Use it as a context manager, or `close` it; many threads may share it.

    Every call has a deadline, and fails with RpcError.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tracer: Tracer | None = None,
    ) -> None:
        """It connects on first use. `credentials` None is plaintext; `tracer` None is OpenTelemetry's global one."""
        self._connection = Connection(address, api_key, timeout_s, tracer)
        self._channel = open_sync_channel(address, credentials=credentials, options=self._connection.options)
        self._generation = SyncGenerationStub(self._channel)
        self._models = SyncModelStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole answer at once. Raises RpcError; TypeError for a prompt or option of no known form."""
        call = self._connection.begin("Generate", prompt, options)
        with call.span as span:
            response = self._generation.generate(call.request, timeout=call.timeout_s, metadata=call.metadata)
            completion = fold.completion(response, span.trace_id)
            span.describe(completion)
        return completion

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """The answer as it is made. Raises TypeError; iterating it raises RpcError."""
        call = self._connection.begin("Stream", prompt, options)
        try:
            responses = self._generation.stream(
                StreamRequest(request=call.request), timeout=call.timeout_s, metadata=call.metadata
            )
        except BaseException as error:
            call.span.end(error)
            raise
        return Stream(responses, call.span)

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The served models, by name. Raises RpcError."""
        response = self._models.list_models(
            ListModelsRequest(),
            timeout=self._connection.timeout(timeout_s),
            metadata=self._connection.metadata(),
        )
        return fold.models(response)

    def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> list[int]:
        """The token ids that a request with this prompt would have. Raises RpcError."""
        response = self._models.tokenize(
            tokenize_request(prompt, model, add_special_tokens),
            timeout=self._connection.timeout(timeout_s),
            metadata=self._connection.metadata(),
        )
        return list(response.token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """The text of token ids. Raises RpcError."""
        response = self._models.detokenize(
            detokenize_request(token_ids, model, skip_special_tokens),
            timeout=self._connection.timeout(timeout_s),
            metadata=self._connection.metadata(),
        )
        return response.text

    def close(self) -> None:
        """End the connection; calls in progress are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
