"""What all calls of a client have in common, async or not."""

import msgspec
from opentelemetry.trace import Tracer

from penstock.client.request import Options, Prompt, generate_request
from penstock.client.span import CallSpan
from penstock.rpc.channel import Option
from penstock.rpc.tls import is_loopback
from penstock.telemetry.tracing import inject
from penstock.v1 import GenerateRequest

DEFAULT_TIMEOUT_S = 600.0

Metadata = tuple[tuple[str, str | bytes], ...]


class Call(msgspec.Struct, frozen=True):
    """One call, ready to be made."""

    request: GenerateRequest
    span: CallSpan
    metadata: Metadata
    timeout_s: float


class Connection:
    """Where a client's calls go, as whom, and for how long at most."""

    def __init__(self, address: str, api_key: str | None, timeout_s: float, tracer: Tracer | None) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, not {timeout_s}")
        self.address = address
        self._timeout_s = timeout_s
        self._tracer = tracer
        self._identity = () if api_key is None else (("authorization", f"Bearer {api_key}"),)

    @property
    def options(self) -> tuple[Option, ...]:
        """Of the channel: what is on this machine is not reached through a proxy."""
        return (("grpc.enable_http_proxy", 0),) if is_loopback(self.address) else ()

    def metadata(self) -> Metadata:
        """For a call without a span of its own: who calls, and the caller's trace if there is one."""
        return inject(self._identity)

    def timeout(self, timeout_s: float | None) -> float:
        """The deadline of one call, in seconds from now."""
        return self._timeout_s if timeout_s is None else timeout_s

    def begin(self, method: str, prompt: Prompt, options: Options) -> Call:
        """Prepare a call and start its span; whoever gets it ends the span. Raises TypeError."""
        request = generate_request(prompt, options)
        span = CallSpan(self._tracer, method, request)
        return Call(request, span, span.injected(self._identity), self.timeout(options.get("timeout_s")))
