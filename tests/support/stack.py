"""Real roles as real processes, on free loopback ports."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc


class Role:
    """One role's process, started and ready."""

    def __init__(self, module: str, arguments: Sequence[str], *, ready_s: float = 60.0) -> None:
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        own = ["--ready-fd", str(writer), "--parent-pid", str(os.getpid())]
        command = [sys.executable, "-m", module, *arguments, *own]
        descriptor, path = tempfile.mkstemp()  # a pipe that nobody empties would stop it
        self._errors = Path(path)
        self.process = subprocess.Popen(command, pass_fds=[writer], stderr=descriptor)
        os.close(descriptor)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            line = pipe.readline()
        if not line:
            self.process.wait(ready_s)
            raise AssertionError(f"{module} is not ready: {self.errors}")
        self.address: str = json.loads(line)["address"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._errors.unlink()

    @property
    def pid(self) -> int:
        """The role's process id."""
        return self.process.pid

    @property
    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return self._errors.read_text()

    def children(self) -> list[psutil.Process]:
        """Processes that the role started."""
        return psutil.Process(self.pid).children()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as flags."""
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


class Stack:
    """A scheduler and a service in front of it."""

    def __init__(self, scheduler: Role, service: Role) -> None:
        self.scheduler = scheduler
        self.service = service

    @property
    def address(self) -> str:
        """Where clients connect."""
        return self.service.address

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        (engine,) = self.scheduler.children()
        return engine


@contextlib.contextmanager
def scheduler(model: Path, **settings: object) -> Iterator[Role]:
    """A scheduler (gate and engine) of a model folder."""
    role = Role("penstock.scheduler.gate.main", [str(model), *flags({"grpc_address": "127.0.0.1:0", **settings})])
    with role:
        yield role


@contextlib.contextmanager
def service(schedulers: Sequence[str], **settings: object) -> Iterator[Role]:
    """A service in front of schedulers."""
    role = Role(
        "penstock.service.main",
        flags({"grpc_address": "127.0.0.1:0", "schedulers": ",".join(schedulers), **settings}),
    )
    with role:
        yield role


@contextlib.contextmanager
def stack(model: Path, **settings: object) -> Iterator[Stack]:
    """A scheduler and a service; ``settings`` are the scheduler's."""
    tracing = {name: value for name, value in settings.items() if name == "otlp_endpoint"}
    with (
        scheduler(model, **settings) as scheduler_role,
        service([scheduler_role.address], **tracing) as service_role,
    ):
        wait_until(lambda: healthy(service_role.address), what="the service reaches its scheduler")
        yield Stack(scheduler_role, service_role)


def healthy(address: str, name: str = "") -> bool:
    """Whether grpc.health.v1 says SERVING."""
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def wait_until(condition: "object", timeout_s: float = 10.0, what: str = "") -> None:
    """Until a callable is true; AssertionError after that time."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
