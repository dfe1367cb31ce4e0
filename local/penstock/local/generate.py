"""`penstock generate`: the smallest client. Streams one completion to the terminal."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Annotated, TextIO

import msgspec
from msgspec import Meta

from penstock.client import Client, Completion, RpcError
from penstock.config import ConfigError, load
from penstock.local import state
from penstock.telemetry import tracing

_DESCRIPTION = "Stream one completion to the terminal, from a running `penstock serve` or from --address."
_INTERRUPTED = 130
_Natural = Annotated[int, Meta(ge=0)]


class GenerateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `penstock generate` is asked for."""

    text: Annotated[str, Meta(description="What is to be continued.")]
    max_tokens: Annotated[int, Meta(ge=1, description="Most tokens to generate.")] = 128
    temperature: Annotated[float | None, Meta(description="0 is greedy. Default: 1.")] = None
    seed: Annotated[_Natural | None, Meta(description="Makes sampling repeatable.")] = None
    address: Annotated[str | None, Meta(description="HOST:PORT of a service. None: the running `penstock serve`.")] = (
        None
    )
    model_name: Annotated[str, Meta(description="Name of a served model; empty: the only one.")] = ""
    api_key: Annotated[str | None, Meta(description="Key of the caller.")] = None
    timeout: Annotated[float, Meta(gt=0, description="Seconds until the deadline.")] = 300.0
    otlp_endpoint: Annotated[
        str | None, Meta(description="Where traces go. None: to the running `penstock serve`.")
    ] = None
    report_fd: Annotated[
        _Natural | None, Meta(description="Descriptor that gets one JSON line when the stream has ended.")
    ] = None


def main(argv: Sequence[str]) -> int:
    """Stream, then tell on stderr what it took. Raises ConfigError and NotRunning."""
    prog = "penstock generate"
    config = load(GenerateConfig, argv, os.environ, prog=prog, description=_DESCRIPTION, positional="text")
    address, endpoint = _where(config)
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # spans that cannot be sent are no matter here
    tracer = tracing.configure("client", endpoint=endpoint)
    try:
        with Client(
            address, api_key=config.api_key, timeout_s=config.timeout, tracer=tracer.tracer("penstock.client")
        ) as client:
            started = time.monotonic()
            completion = _stream(client, config, sys.stdout)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except ValueError as error:  # of the client's arguments
        raise ConfigError(str(error)) from error
    except RpcError as error:
        print(f"error: {error.code.name}: {error}", file=sys.stderr)
        return 1
    finally:
        tracer.shutdown()
    _tell(completion, time.monotonic() - started, kept=config.address is None)
    if config.report_fd is not None:
        _report(completion, config.report_fd)
    return 0


def _where(config: GenerateConfig) -> tuple[str, str | None]:
    """The service's address, and where the spans go."""
    if config.address is not None:
        return config.address, config.otlp_endpoint
    serve = state.find(state.state_path(), flag="--address")
    return serve.grpc_address, config.otlp_endpoint or serve.trace_address


def _stream(client: Client, config: GenerateConfig, out: TextIO) -> Completion:
    stream = client.stream(
        config.text,
        model=config.model_name,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )
    with stream:
        before = config.text
        for chunk in stream:
            out.write(before + chunk.text)
            out.flush()
            before = ""
    out.write("\n")
    out.flush()
    return stream.completion


def _tell(completion: Completion, seconds: float, *, kept: bool) -> None:
    facts = [
        f"{completion.usage.completion_tokens} tokens",
        completion.finish_reason.name or str(int(completion.finish_reason)),
        f"{seconds:.2f} s",
        f"seed {completion.seed}",
    ]
    if kept and completion.trace_id:
        facts.append(f"see: penstock trace {completion.trace_id}")
    print(" · ".join(facts), file=sys.stderr)


def _report(completion: Completion, descriptor: int) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "w") as pipe:
        pipe.write(json.dumps({"trace_id": completion.trace_id}) + "\n")
