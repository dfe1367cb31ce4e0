"""`penstock demo`: every role as its own process, one completion streamed, its trace drawn, all shut down."""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from penstock.config import load
from penstock.config.process import set_process_name
from penstock.local import lifetime
from penstock.local.layout import ServeConfig, layout_of, own_key
from penstock.local.role_process import RoleFailed, read_line
from penstock.local.roles import role_command
from penstock.local.supervisor import Running
from penstock.local.traces import query
from penstock.local.traces.spans import Span, build_tree

_DESCRIPTION = "Start every role, stream one completion from the model that is shipped, and draw its trace."
_PROCESSES = 4
"""Client, service, gate and engine."""
_TRACE_TIMEOUT_S = 5.0
_CLIENT_TIMEOUT_S = 120.0
_INTERRUPTED = 130


class DemoConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `penstock demo` is asked for."""

    prompt: Annotated[str, Meta(description="What is to be continued.")] = "def read_lines(path):\n"
    max_tokens: Annotated[int, Meta(ge=1, description="Most tokens to generate.")] = 96
    temperature: Annotated[float, Meta(ge=0, description="0 is greedy.")] = 0.0
    seed: Annotated[int, Meta(ge=0, description="Makes sampling repeatable.")] = 0


def main(argv: Sequence[str]) -> int:
    """Run it all; 0 if all went well. Raises ConfigError."""
    prog = "penstock demo"
    config = load(DemoConfig, argv, os.environ, prog=prog, description=_DESCRIPTION)
    set_process_name("penstock-demo")
    layout = layout_of(ServeConfig(grpc_address="127.0.0.1:0"))

    async def show(running: Running) -> int:
        return await _show(running, config)

    _say("starting service, scheduler and engine, each a process of its own …")
    return asyncio.run(lifetime.run(layout, show, code_if_stopped=_INTERRUPTED))


async def _show(running: Running, config: DemoConfig) -> int:
    pids = " ".join(f"{name}={pid}" for name, pid in running.pids.items())
    _say(f"ready: {running.model} at {running.grpc_address} ({pids}); streaming over gRPC …\n")
    trace_id = await _generate(running, config)
    try:
        # In a thread, since the receiver that is asked runs on this loop.
        whole = await asyncio.to_thread(_draw, running.trace_address, trace_id)
    except (query.TraceNotFound, query.ReceiverUnavailable) as error:
        raise RoleFailed(str(error)) from error
    if not whole:
        raise RoleFailed(f"the trace is not whole after {_TRACE_TIMEOUT_S:g} s")
    return 0


def _draw(address: str, trace_id: str) -> bool:
    """Draw a trace once it is whole; False if it did not get so in time."""
    spans = query.wait_for(address, trace_id, _is_whole, timeout_s=_TRACE_TIMEOUT_S)
    print()
    query.show(address, trace_id, sys.stdout)
    sys.stdout.flush()
    return _is_whole(spans)


async def _generate(running: Running, config: DemoConfig) -> str:
    """Stream one completion in a process of its own, `penstock generate`; its trace id."""
    read_end, write_end = os.pipe()
    try:
        client = await asyncio.create_subprocess_exec(
            *_client_command(running, config, write_end),
            pass_fds=(write_end,),
            stdin=asyncio.subprocess.DEVNULL,
            env=_client_environ(),
        )
    finally:
        os.close(write_end)
    try:
        async with asyncio.timeout(_CLIENT_TIMEOUT_S):
            report = await read_line(read_end)
            code = await client.wait()
    finally:
        if client.returncode is None:
            client.kill()
            await client.wait()
    if code != 0 or not report:
        raise RoleFailed(f"the client ended with exit code {code}", explained=True)
    return str(json.loads(report)["trace_id"])


def _client_command(running: Running, config: DemoConfig, report_fd: int) -> list[str]:
    asked = [
        f"--max-tokens={config.max_tokens}",
        f"--temperature={config.temperature}",
        f"--seed={config.seed}",
        f"--text={config.prompt}",
    ]
    where = [f"--address={running.grpc_address}", f"--otlp-endpoint={running.trace_address}"]
    return role_command("penstock.local.main", ["generate", *asked, *where, f"--report-fd={report_fd}"])


def _client_environ() -> dict[str, str]:
    key = own_key(os.environ)
    return {**os.environ, **({} if key is None else {"PENSTOCK_API_KEY": key})}


def _is_whole(spans: Sequence[Span]) -> bool:
    """One root, no span without its parent, and a span of every process."""
    tree = build_tree(spans)
    return len(tree.roots) == 1 and not tree.orphans and len({span.pid for span in spans}) >= _PROCESSES


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
