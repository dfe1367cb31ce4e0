"""The engine's process: how it ends."""

import os
import subprocess
from collections.abc import Callable

import pytest

from penstock.executor.ring import RingReader, RingWriter, create_ring
from penstock.executor.step import ModelSpec
from penstock.scheduler.records import commands, events
from penstock.scheduler.records.startup import EngineArguments, EngineSpec
from penstock.scheduler.records.vitals import Vitals


def run(executor: str, send: Callable[[RingWriter], None]) -> tuple[int, list[events.Event]]:
    """Start an engine, say something to it, and wait for its end: its exit code and all that it told."""
    command_ring, event_ring = create_ring(1 << 20), create_ring(1 << 20)
    send(RingWriter(command_ring))
    arguments = EngineArguments(
        spec=EngineSpec(executor=executor, model=ModelSpec(path="/nonexistent"), log_level="error"),
        commands=command_ring.encode(),
        events=event_ring.encode(),
        vitals_fd=Vitals.create().memfd,
        parent_pid=os.getpid(),
    )
    done = subprocess.run(arguments.argv(), pass_fds=arguments.fds(), capture_output=True, timeout=30, check=False)
    reader, told = RingReader(event_ring), list[events.Event]()
    while (data := reader.get()) is not None:
        told.append(events.decode(data))
    return done.returncode, told


def test_it_ends_when_told_to() -> None:
    code, told = run("simulated", lambda ring: _put(ring, commands.encode(commands.Shutdown())))
    assert code == 0
    assert isinstance(told[0], events.Started)


@pytest.mark.parametrize(
    ("executor", "record", "why"),
    [
        ("abacus", b"", "unknown executor 'abacus'"),
        ("simulated", b"\xc1 no record", "the engine failed: "),
    ],
)
def test_an_engine_that_cannot_go_on_says_why_in_one_line(executor: str, record: bytes, why: str) -> None:
    code, told = run(executor, lambda ring: _put(ring, record))
    assert code == 1
    assert isinstance(told[-1], events.Failed)
    assert told[-1].message.startswith(why)
    assert "\n" not in told[-1].message


def _put(ring: RingWriter, data: bytes) -> None:
    assert ring.put(data)
