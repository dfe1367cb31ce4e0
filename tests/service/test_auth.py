"""Who may call, and what an operator may configure."""

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock.config import ConfigError, load
from penstock.rpc.channel import open_channel
from penstock.rpc.errors import RpcError
from penstock.rpc.stubs import ModelStub
from penstock.rpc.tls import channel_credentials, server_credentials
from penstock.service.auth import ApiKeys, Identity, OpenAccess
from penstock.service.config import ServiceConfig
from penstock.v1 import ErrorReason, ListModelsRequest
from service.fake_scheduler import FakeScheduler
from service.harness import request, serving, stream, text_of

KEYS = ("plain-key", "acme:acme-key")


def test_keys_name_their_tenant() -> None:
    keys = ApiKeys(KEYS)
    assert keys.authenticate([("authorization", "Bearer plain-key")]) == Identity("default")
    assert keys.authenticate([("x-api-key", "acme-key"), ("other", "x")]) == Identity("acme")
    assert keys.authenticate([("authorization", "bearer acme-key"), ("x-api-key", "acme-key")]).tenant == "acme"
    assert OpenAccess().authenticate([]).tenant == "default"


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "plain-key")],
        [("authorization", "Basic plain-key")],
        [("x-api-key", "")],
        [("x-api-key", "plain-ke")],
        [("x-api-key", "acme:acme-key")],
        [("x-api-key", "plain-key"), ("x-api-key", "acme-key")],
        [("x-api-key", "x" * 10_000)],
        [("x-api-key-bin", b"plain-key")],
    ],
)
def test_everything_else_is_refused(metadata: list[tuple[str, str | bytes]]) -> None:
    with pytest.raises(RpcError) as caught:
        ApiKeys(KEYS).authenticate(metadata)
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert "plain-key" not in str(caught.value)


def test_no_key_is_kept() -> None:
    keys = ApiKeys(KEYS)
    assert not any(secret in repr(keys._entries) for secret in ("plain-key", "acme-key"))


@pytest.mark.parametrize("entries", [[""], ["acme:"], [":key"], ["a", "a"], ["a:x", "b:x"], ["x" * 600]])
def test_useless_keys_are_refused(entries: list[str]) -> None:
    with pytest.raises(ValueError, match="api_keys"):
        ApiKeys(entries)


def test_calls_without_a_key_reach_nothing() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with serving(scheduler, api_keys=KEYS) as running:
            calls = (
                stream(running, request()),
                running.generation.generate(request()),
                running.models.list_models(ListModelsRequest()),
            )
            for call in calls:
                with pytest.raises(RpcError) as caught:
                    await call
                assert caught.value.reason == ErrorReason.UNAUTHENTICATED
            assert scheduler.submits == []
            await stream(running, request(), metadata=[("authorization", "Bearer acme-key")])
        assert [submit.tenant for submit in scheduler.submits] == ["acme"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"schedulers": ()}, "schedulers"),
        ({"schedulers": ("127.0.0.1:1", "127.0.0.1:1")}, "schedulers"),
        ({"schedulers": ("127.0.0.1",)}, "schedulers"),
        ({"schedulers": ("10.0.0.1:5",)}, "10.0.0.1:5"),
        ({"grpc_address": "127.0.0.1:99999"}, "grpc_address"),
        ({"grpc_address": "0.0.0.0:1"}, "api_keys"),
        ({"grpc_address": "0.0.0.0:1", "allow_plaintext": True}, "api_keys"),
        ({"grpc_address": "0.0.0.0:1", "api_keys": ("k",)}, "0.0.0.0:1"),
        ({"tls_key": Path("key.pem")}, "tls_certificate"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ServiceConfig(**settings)


def test_beyond_loopback_with_keys_and_a_word_from_the_operator() -> None:
    ServiceConfig(grpc_address="0.0.0.0:1", api_keys=("k",), allow_plaintext=True)
    ServiceConfig(grpc_address="[::1]:1", schedulers=("localhost:2", "unix:/tmp/s"))


def test_keys_are_masked_when_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(ServiceConfig, ["--api-keys", "very-secret", "--print-config"], {}, prog="p", description="d")
    assert caught.value.code == 0
    assert "very-secret" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--silence"):
        load(ServiceConfig, ["--silence", "0"], {}, prog="p", description="d")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for this machine, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    pem, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=60)
    return pem, key


def test_tls_to_callers_and_to_schedulers(certificate: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        pem, key = certificate
        scheduler = FakeScheduler(credentials=server_credentials(pem, key))
        settings: dict[str, Any] = {"tls_certificate": pem, "tls_key": key, "scheduler_ca": pem}
        async with serving(scheduler, credentials=channel_credentials(pem), **settings) as running:
            assert text_of(await stream(running, request())) == "hello"
            async with open_channel(running.address) as plain:
                with pytest.raises(RpcError):
                    await ModelStub(plain).list_models(ListModelsRequest(), timeout=5)

    asyncio.run(scenario())
