"""The exporting half of tracing: the OpenTelemetry SDK with a bounded queue and an OTLP gRPC exporter."""

import ipaddress
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, Tracer

from penstock.telemetry.tracing import Attributes, SpanEmitter, SpanEvent

_QUEUE_SPANS = 8192
_BATCH_SPANS = 128
"""Encoding holds the interpreter lock: small batches keep stalls short."""
_FLUSH_PERIOD_MS = 250.0
_EXPORT_TIMEOUT_S = 5.0


class OtlpTracing:
    """Spans of this process, and of others on their behalf, on their way to one OTLP endpoint.

    When the endpoint is slow or gone the queue drops spans (the SDK logs it); nothing here ever waits for
    it except `force_flush` and `shutdown`.
    """

    enabled = True

    def __init__(
        self, service_name: str, endpoint: str, sample_ratio: float, service_instance: str | None = None
    ) -> None:
        """Starts the export thread. Raises ValueError if `endpoint` is not `host:port` or an http(s) URL."""
        self._exporter = _exporter(endpoint)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=_QUEUE_SPANS,
            schedule_delay_millis=_FLUSH_PERIOD_MS,
            max_export_batch_size=_BATCH_SPANS,
        )
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=_resource(service_name, os.getpid(), service_instance),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(self._processor)

    def tracer(self, name: str) -> Tracer:
        """The tracer of the instrumented part `name`."""
        return self._provider.get_tracer(name)

    def for_resource(self, service_name: str, pid: int) -> SpanEmitter:
        """An emitter under another process's resource, through the same queue."""
        return _ResourceEmitter(_resource(service_name, pid, None), self._processor)

    def force_flush(self, timeout_s: float = 5.0) -> bool:
        """Send what is queued; False if that took longer than `timeout_s`."""
        return _within(timeout_s, self._provider.force_flush)

    def shutdown(self, timeout_s: float = 2.0) -> bool:
        """Send what is queued and stop; False if spans were left behind after `timeout_s`."""
        if _within(timeout_s, self._provider.shutdown):
            return True
        self._exporter.shutdown()  # ends a call or a retry that hangs, so that the export thread ends too
        return False


class _ResourceEmitter:
    enabled = True

    def __init__(self, resource: Resource, processor: SpanProcessor) -> None:
        self._resource = resource
        self._processor = processor
        self._scope = InstrumentationScope("penstock.telemetry")

    def emit(
        self,
        name: str,
        *,
        context: SpanContext,
        parent: SpanContext | None,
        start_unix_ns: int,
        end_unix_ns: int,
        attributes: Attributes | None = None,
        events: Sequence[SpanEvent] = (),
        links: Sequence[Link | SpanContext] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status | None = None,
    ) -> None:
        """See `SpanEmitter.emit`."""
        if not context.trace_flags.sampled:
            return
        self._processor.on_end(
            ReadableSpan(
                name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                events=[Event(event, attributes=about, timestamp=at) for event, at, about in events],
                links=[link if isinstance(link, Link) else Link(link) for link in links],
                kind=kind,
                status=status or Status(StatusCode.UNSET),
                start_time=start_unix_ns,
                end_time=max(start_unix_ns, end_unix_ns),
                instrumentation_scope=self._scope,
            )
        )


def _resource(service_name: str, pid: int, instance: str | None) -> Resource:
    """Who did the work; `OTEL_RESOURCE_ATTRIBUTES` may add to it."""
    return Resource.create(
        {
            "service.name": service_name,
            "service.instance.id": instance or str(uuid.uuid4()),
            "process.pid": pid,
        }
    )


def _exporter(endpoint: str) -> OTLPSpanExporter:
    url = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    if url.scheme not in ("", "http", "https") or not url.hostname or _port(url.netloc) is None:
        raise ValueError(f"trace endpoint {endpoint!r} is not host:port or an http(s) URL with a port")
    loopback = _is_loopback(url.hostname)
    return OTLPSpanExporter(
        endpoint=url.netloc,
        insecure=url.scheme == "http" or (loopback and url.scheme != "https"),
        timeout=_EXPORT_TIMEOUT_S,
        channel_options=(("grpc.enable_http_proxy", 0),) if loopback else None,  # type: ignore[arg-type]
    )


def _port(netloc: str) -> int | None:
    try:
        return urlsplit(f"//{netloc}").port
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _within(timeout_s: float, call: Callable[[], object]) -> bool:
    """Run `call` in a thread, as the SDK's own flush keeps no deadline; False if it is not done in time."""
    thread = threading.Thread(target=call, name="penstock-trace-flush", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()
