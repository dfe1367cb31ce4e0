"""The supervisor and the life it leads, with roles that do next to nothing."""

import asyncio
import os
import signal
import textwrap
from pathlib import Path

import pytest

from penstock.local import lifetime
from penstock.local.roles import SCHEDULER, SERVICE
from penstock.local.supervisor import Layout, Running, Supervisor

COMMON = """
import asyncio, json, os, pathlib, signal, sys
from penstock import v1
from penstock.rpc.server import Server

class Models:
    ready = True
    async def list_models(self, request, context):
        replica = v1.Replica(name="one", ready=self.ready)
        return v1.ListModelsResponse(models=[v1.Model(name="fake", replicas=[replica])])

async def serve(role, before_end=lambda: None):
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    server = Server(flags["--grpc-address"], on_error=lambda *error: print(error, file=sys.stderr))
    server.add("penstock.v1.ModelService", Models())
    address = await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    pathlib.Path(__file__).with_name(role).write_text(json.dumps(flags))
    with os.fdopen(int(flags["--ready-fd"]), "w") as pipe:
        pipe.write(json.dumps({"address": address, "pid": os.getpid(), "role": role}) + "\\n")
    await stop.wait()
    with open(pathlib.Path(__file__).with_name("order"), "a") as order:
        order.write(role + "\\n")
    await server.stop(0)
"""

GOOD = "from fake_common import *\nasyncio.run(serve({role!r}))"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fake roles lie; both are good until they are written anew."""
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *([inherited] if inherited else [])]))
    (tmp_path / "fake_common.py").write_text(COMMON)
    for role in (SCHEDULER, SERVICE):
        (tmp_path / f"fake_{role}.py").write_text(GOOD.format(role=role))
    return tmp_path


def layout(**changes: object) -> Layout:
    modules = {SCHEDULER: "fake_scheduler", SERVICE: "fake_service"}
    settings = {"grpc_address": "127.0.0.1:0", "modules": modules, "start_timeout_s": 30.0, "drain_grace_s": 5.0}
    return Layout(**(settings | changes))  # type: ignore[arg-type]


async def idle(running: Running) -> int:
    await asyncio.Event().wait()
    return 0


def write(folder: Path, role: str, body: str) -> None:
    (folder / f"fake_{role}.py").write_text("from fake_common import *\n" + textwrap.dedent(body))


def all_gone(running: Running) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in running.pids.values())


async def test_all_start_and_end_in_order(folder: Path) -> None:
    supervisor = Supervisor(layout(scheduler_argv=("--a", "1"), service_argv=("--b", "2")))
    running = await supervisor.start()
    assert running.model == "fake"
    assert set(running.pids) == {SCHEDULER, SERVICE}
    assert await supervisor.stop() == []
    assert (folder / "order").read_text().split() == [SERVICE, SCHEDULER]
    assert all_gone(running)
    given = (folder / SERVICE).read_text()
    assert '"--b": "2"' in given
    assert f'"--otlp-endpoint": "{running.trace_address}"' in given
    assert f'"--parent-pid": "{os.getpid()}"' in given
    assert '"--a": "1"' in (folder / SCHEDULER).read_text()


async def test_a_role_that_cannot_start_has_the_only_word(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(folder, SCHEDULER, "sys.exit('error: weights.safetensors: tensor norm has a wrong shape')")
    assert await lifetime.run(layout(), idle, code_if_stopped=0) == 1
    assert capfd.readouterr().err == "error: weights.safetensors: tensor norm has a wrong shape\n"


async def test_a_role_that_refuses_its_configuration_decides_the_exit_code(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(folder, SCHEDULER, "print('error: grpc_address: no', file=sys.stderr); sys.exit(2)")
    assert await lifetime.run(layout(), idle, code_if_stopped=0) == 2
    assert capfd.readouterr().err == "error: grpc_address: no\n"


async def test_a_role_that_ends_later_ends_all(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[Running] = []

    async def kill_scheduler(running: Running) -> int:
        seen.append(running)
        os.kill(running.pids[SCHEDULER], signal.SIGKILL)
        return await idle(running)

    assert await lifetime.run(layout(), kill_scheduler, code_if_stopped=0) == 1
    said = capfd.readouterr().err
    assert said == f"error: the scheduler (pid {seen[0].pids[SCHEDULER]}) was ended by SIGKILL\n"
    assert all_gone(seen[0])


async def test_a_service_that_ends_while_the_model_is_awaited(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(
        folder,
        SERVICE,
        """
        Models.ready = False
        async def short():
            asyncio.get_running_loop().call_later(0.3, os._exit, 3)
            await serve("service")
        asyncio.run(short())
        """,
    )
    assert await lifetime.run(layout(), idle, code_if_stopped=0) == 1
    assert "the service" in (said := capfd.readouterr().err)
    assert "ended with exit code 3" in said


async def test_a_model_that_never_gets_ready(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(folder, SERVICE, "Models.ready = False\nasyncio.run(serve('service'))")
    assert await lifetime.run(layout(start_timeout_s=2.5), idle, code_if_stopped=0) == 1
    assert "after 2.5 s" in capfd.readouterr().err


async def test_the_work_done_all_is_drained(folder: Path) -> None:
    async def work(running: Running) -> int:
        return 7

    assert await lifetime.run(layout(), work, code_if_stopped=0) == 7
    assert (folder / "order").read_text().split() == [SERVICE, SCHEDULER]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(folder: Path, number: signal.Signals) -> None:
    async def signalled(running: Running) -> int:
        os.kill(os.getpid(), number)
        return await idle(running)

    assert await lifetime.run(layout(), signalled, code_if_stopped=0) == 0
    assert (folder / "order").read_text().split() == [SERVICE, SCHEDULER]


async def test_a_second_signal_kills(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(
        folder,
        SERVICE,
        """
        async def stubborn():
            os.kill(os.getppid(), signal.SIGTERM)
            await asyncio.sleep(60)
        flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        serving = serve("service")
        async def main():
            task = asyncio.create_task(serving)
            await task
            await stubborn()
        asyncio.run(main())
        """,
    )
    seen: list[Running] = []

    async def signalled(running: Running) -> int:
        seen.append(running)
        os.kill(os.getpid(), signal.SIGTERM)
        return await idle(running)

    started = asyncio.get_running_loop().time()
    assert await lifetime.run(layout(), signalled, code_if_stopped=0) == 1
    assert asyncio.get_running_loop().time() - started < 9
    assert "SIGKILL" in capfd.readouterr().err
    assert all_gone(seen[0])
