"""`penstock serve` with several service processes behind its one address."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from local.test_serve import ENGINE, GATE, SERVICE, Serve
from penstock.client import Client
from support.stack import wait_until


def answer(address: str) -> int:
    with Client(address, timeout_s=30) as client:
        return client.generate([5] * 4, max_tokens=4, ignore_eos=True).usage.completion_tokens


@pytest.mark.timeout(180)
def test_two_behind_one_address(tmp_path: Path) -> None:
    serve = Serve(tmp_path, "--executor", "simulated", "--service-processes", "2")
    try:
        # The parent that holds the port, and the two that serve.
        assert sorted(role.name() for role in serve.roles) == [ENGINE, GATE, SERVICE, SERVICE, SERVICE]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(answer, [serve.address] * 16)) == [4] * 16
        (parent,) = [role for role in serve.roles if role.name() == SERVICE and role.children()]
        victim = parent.children()[0]
        victim.kill()
        wait_until(lambda: len(set(parent.children()) - {victim}) == 2, what="the dead process is replaced")
        assert answer(serve.address) == 4
        serve.roles += parent.children()
        assert serve.end(signal.SIGTERM) == 0
        assert serve.left_behind() == []
    finally:
        serve.close()


@pytest.mark.timeout(180)
def test_kill_9_of_their_parent_leaves_nothing(tmp_path: Path) -> None:
    serve = Serve(tmp_path, "--executor", "simulated", "--service-processes", "2")
    try:
        (parent,) = [role for role in serve.roles if role.name() == SERVICE and role.children()]
        parent.kill()
        serve.process.communicate(timeout=20)
        assert serve.process.returncode == 1
        assert serve.left_behind() == []
        assert f"error: the service (pid {parent.pid}) was ended by SIGKILL" in serve.errors.read_text()
    finally:
        serve.close()
        for role in serve.roles:
            if role.is_running():
                psutil.Process(role.pid).kill()
