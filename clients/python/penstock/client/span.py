"""The client's span of one call, and the metadata by which the service continues its trace."""

from types import TracebackType
from typing import Self

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from penstock.client.types import Completion
from penstock.rpc.errors import RpcError
from penstock.telemetry.tracing import inject
from penstock.v1 import GenerateRequest

_SERVICE = "penstock.v1.GenerationService"


class CallSpan:
    """A span of kind CLIENT around one call; as a context manager it ends with its block.

    It never becomes the current span, as a stream outlives the code that opened it. Without a tracer that
    records, the service continues the caller's own span if there is one.
    """

    def __init__(self, tracer: Tracer | None, method: str, request: GenerateRequest) -> None:
        attributes = {"rpc.system": "grpc", "rpc.service": _SERVICE, "rpc.method": method}
        if request.model:
            attributes["gen_ai.request.model"] = request.model
        if request.request_id:
            attributes["penstock.request_id"] = request.request_id
        self._ended = False
        self._span: Span = (tracer or trace.get_tracer("penstock.client")).start_span(
            f"penstock.client/{method}", kind=SpanKind.CLIENT, attributes=attributes
        )

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty where there is no trace."""
        context = self._span.get_span_context()
        return f"{context.trace_id:032x}" if context.is_valid else ""

    def injected(self, metadata: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str | bytes], ...]:
        """The metadata with this span's trace context."""
        return inject(metadata, self._span.get_span_context())

    def event(self, name: str) -> None:
        """Note a moment."""
        self._span.add_event(name)

    def describe(self, completion: Completion) -> None:
        """Note who answered and what it cost."""
        self._span.set_attribute("gen_ai.response.model", completion.model)
        self._span.set_attribute("gen_ai.usage.input_tokens", completion.usage.prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", completion.usage.completion_tokens)

    def end(self, error: BaseException | None = None) -> None:
        """End it, failed by an RpcError; by anything else its caller was made to leave. The first end counts."""
        if self._ended:
            return
        self._ended = True
        if isinstance(error, RpcError):
            self._span.set_attribute("error.type", error.reason.name or error.code.name)
            self._span.set_status(Status(StatusCode.ERROR, error.code.name))
        elif error is not None:
            self._span.set_attribute("penstock.cancelled", True)
        self._span.end()

    def leave(self) -> None:
        """End it: its caller wants no more."""
        if not self._ended:
            self._span.set_attribute("penstock.cancelled", True)
        self.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)
