"""TLS and mutual TLS with certificates that openssl makes, and where plaintext may go."""

import subprocess
from pathlib import Path

import grpc
import pytest

from penstock import v1
from penstock.rpc import tls
from penstock.rpc.channel import open_channel
from penstock.rpc.errors import RpcError
from penstock.rpc.stubs import ModelStub
from penstock.v1 import ErrorReason
from rpc.serving import Serve

MODEL = "penstock.v1.ModelService"


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


def certify(folder: Path, name: str, ca: str | None) -> None:
    """``name``.key and ``name``.pem for localhost, signed by ``ca`` or by itself."""
    key, pem = folder / f"{name}.key", folder / f"{name}.pem"
    options: list[object] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key]
    options += ["-out", pem, "-subj", f"/CN={name}", "-days", "2"]
    if ca is None:
        openssl("req", "-x509", *options)
        return
    signing: list[object] = ["-CA", folder / f"{ca}.pem", "-CAkey", folder / f"{ca}.key"]
    openssl("req", "-x509", *options, *signing, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for name, ca in (("ca", None), ("stranger", None), ("server", "ca"), ("client", "ca"), ("intruder", "stranger")):
        certify(folder, name, ca)
    return folder


async def reason_of(address: str, credentials: grpc.ChannelCredentials | None) -> tuple[grpc.StatusCode, ErrorReason]:
    """How a call of a method that is not there fails: UNSUPPORTED_METHOD proves that the server was reached."""
    async with open_channel(address, credentials=credentials) as channel:
        with pytest.raises(RpcError) as caught:
            await ModelStub(channel).list_models(v1.ListModelsRequest(), timeout=5)
    return caught.value.code, caught.value.reason


REACHED = (grpc.StatusCode.UNIMPLEMENTED, ErrorReason.UNSUPPORTED_METHOD)


async def test_tls_reaches_who_trusts_the_ca(serve: Serve, certificates: Path) -> None:
    credentials = tls.server_credentials(certificates / "server.pem", certificates / "server.key")
    async with serve({MODEL: object()}, credentials=credentials) as address:
        assert await reason_of(address, tls.channel_credentials(certificates / "ca.pem")) == REACHED
        stranger = tls.channel_credentials(certificates / "stranger.pem")
        assert (await reason_of(address, stranger))[0] is grpc.StatusCode.UNAVAILABLE
        assert (await reason_of(address, None))[0] is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls_wants_a_certificate_of_its_ca(serve: Serve, certificates: Path) -> None:
    ca = certificates / "ca.pem"
    credentials = tls.server_credentials(certificates / "server.pem", certificates / "server.key", ca)
    async with serve({MODEL: object()}, credentials=credentials) as address:
        known = tls.channel_credentials(ca, certificates / "client.pem", certificates / "client.key")
        assert await reason_of(address, known) == REACHED
        intruder = tls.channel_credentials(ca, certificates / "intruder.pem", certificates / "intruder.key")
        assert (await reason_of(address, intruder))[0] is grpc.StatusCode.UNAVAILABLE
        assert (await reason_of(address, tls.channel_credentials(ca)))[0] is grpc.StatusCode.UNAVAILABLE


def test_broken_files_are_named(certificates: Path, tmp_path: Path) -> None:
    pem, key = certificates / "server.pem", certificates / "server.key"
    text = tmp_path / "text.pem"
    text.write_text("not a certificate")
    with pytest.raises(tls.TlsError, match=r"cannot read .*missing\.pem"):
        tls.server_credentials(tmp_path / "missing.pem", key)
    with pytest.raises(tls.TlsError, match=r"server\.pem and .*client\.key"):
        tls.server_credentials(pem, certificates / "client.key")
    with pytest.raises(tls.TlsError, match=r"text\.pem"):
        tls.server_credentials(text, key)
    with pytest.raises(tls.TlsError, match=r"text\.pem holds no PEM certificates"):
        tls.channel_credentials(text)
    with pytest.raises(tls.TlsError, match="together"):
        tls.channel_credentials(certificate=pem)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:1", "127.8.9.1:0", "localhost:1", "[::1]:1", "::1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1"),
        *("unix:/tmp/x", "unix-abstract:x", "dns:///localhost:1"),
    ],
)
def test_loopback_may_be_plaintext(address: str) -> None:
    tls.require_secure(address, None, allow_insecure=False)


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "localhost.example.org:1", "dns:///10.1.1.1:1", ":1", ""],
)
def test_elsewhere_plaintext_is_refused_unless_allowed(address: str) -> None:
    with pytest.raises(tls.TlsError, match="loopback"):
        tls.require_secure(address, None, allow_insecure=False)
    tls.require_secure(address, None, allow_insecure=True)
    tls.require_secure(address, grpc.ssl_channel_credentials(), allow_insecure=False)
