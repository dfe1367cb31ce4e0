"""Traces and logs: one way for every role.

`penstock.telemetry.logging` loads structlog only, so that the engine can use it;
`penstock.telemetry.tracing` loads the OpenTelemetry API, and its SDK and exporter only once an endpoint is
configured.
"""
