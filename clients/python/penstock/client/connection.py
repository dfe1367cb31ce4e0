"""What all calls of a client have in common, async or not."""

import math

import msgspec
from opentelemetry.trace import Tracer

from penstock.client.request import Options, Prompt, generate_request
from penstock.client.span import CallSpan
from penstock.rpc.channel import Option
from penstock.rpc.tls import is_loopback
from penstock.telemetry.tracing import inject
from penstock.v1 import GenerateRequest

DEFAULT_TIMEOUT_S = 600.0
MAX_TIMEOUT_S = 365 * 86_400.0
"""What is longer counts as this long: gRPC takes a deadline beyond its clock's range for one that has passed."""

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
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, not {timeout_s}")
        if not address:
            raise ValueError("address is empty")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key has characters that no header can carry")  # and is not quoted
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
        """The deadline of one call, in seconds from now. Raises ValueError for NaN."""
        asked = self._timeout_s if timeout_s is None else timeout_s
        if math.isnan(asked):
            raise ValueError("timeout_s is not a number")
        return min(asked, MAX_TIMEOUT_S)

    def begin(self, method: str, prompt: Prompt, options: Options) -> Call:
        """Prepare a call and start its span; whoever gets it ends the span. Raises TypeError and ValueError."""
        request = generate_request(prompt, options)
        timeout_s = self.timeout(options.get("timeout_s"))
        span = CallSpan(self._tracer, method, request)
        return Call(request, span, span.injected(self._identity), timeout_s)
