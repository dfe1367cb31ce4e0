"""`penstock trace`: draws a request's trace, kept by the running `penstock serve`."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from penstock.config import ConfigError, load
from penstock.local import state
from penstock.local.traces import page, query

_DESCRIPTION = "Draw the trace of a request: who called whom, in which process, when and for how long."
_TRACE_ID = re.compile("[0-9a-f]{32}")


class TraceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `penstock trace` is asked for."""

    trace_id: Annotated[str, Meta(description="32 hexadecimal digits. Empty: the latest complete trace.")] = ""
    receiver: Annotated[
        str | None, Meta(description="HOST:PORT of a trace receiver. None: the running `penstock serve`.")
    ] = None
    html: Annotated[Path | None, Meta(description="Write it to this file as a page, instead.")] = None


def main(argv: Sequence[str]) -> int:
    """Draw one trace to stdout. Raises ConfigError and NotRunning."""
    prog = "penstock trace"
    config = load(TraceConfig, argv, os.environ, prog=prog, description=_DESCRIPTION, positional="trace_id")
    trace_id = config.trace_id.lower()
    if trace_id and not _TRACE_ID.fullmatch(trace_id):
        raise ConfigError(f"TRACE_ID: expected 32 hexadecimal digits, got {config.trace_id!r}")
    address = config.receiver or state.find(state.state_path(), flag="--receiver").trace_address
    try:
        if config.html is None:
            query.show(address, trace_id, sys.stdout)
        else:
            config.html.write_text(page.render(query.fetch(address, trace_id)), encoding="utf-8")
    except (query.TraceNotFound, query.ReceiverUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
