"""Transport credentials, and the rule that plaintext stays on this machine."""

import ipaddress
import re
import ssl
from pathlib import Path

import grpc


class TlsError(ValueError):
    """A certificate, a key or an address cannot be used; the text is one line that names it."""


def server_credentials(
    certificate: Path | str, key: Path | str, client_ca: Path | str | None = None
) -> grpc.ServerCredentials:
    """TLS from PEM files; with ``client_ca`` clients must show a certificate that it signed. Raises TlsError."""
    _check_pair(certificate, key)
    return grpc.ssl_server_credentials(
        [(_read(key), _read(certificate))],
        root_certificates=_read_ca(client_ca),
        require_client_auth=client_ca is not None,
    )


def channel_credentials(
    ca: Path | str | None = None, certificate: Path | str | None = None, key: Path | str | None = None
) -> grpc.ChannelCredentials:
    """TLS from PEM files; without ``ca`` the public roots count. Certificate and key come together. Raises TlsError."""
    if certificate is None or key is None:
        if certificate is not key:
            raise TlsError("a client certificate and its key are given together")
        return grpc.ssl_channel_credentials(root_certificates=_read_ca(ca))
    _check_pair(certificate, key)
    return grpc.ssl_channel_credentials(
        root_certificates=_read_ca(ca), private_key=_read(key), certificate_chain=_read(certificate)
    )


def require_secure(address: str, credentials: object | None, allow_insecure: bool) -> None:
    """Raise TlsError for plaintext beyond this machine unless the operator insists."""
    if credentials is None and not allow_insecure and not is_loopback(address):
        raise TlsError(f"{address} is not a loopback address: give it TLS credentials, or allow plaintext explicitly")


def is_loopback(address: str) -> bool:
    """Whether a gRPC address stays on this machine: loopback addresses, ``localhost``, unix sockets."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = _host(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(address: str) -> str:
    """The host of ``[scheme:[//authority/]]host[:port]``, without the brackets of IPv6."""
    rest = re.sub(r"^(dns:(//[^/]*/)?|ipv4:|ipv6:)", "", address)
    bracketed = re.match(r"^\[([^\]]*)\]", rest)
    if bracketed:
        return bracketed.group(1)
    return rest.rpartition(":")[0] if rest.count(":") == 1 else rest


def _read(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TlsError(f"cannot read {path}: {error.strerror}") from error


def _read_ca(path: Path | str | None) -> bytes | None:
    if path is None:
        return None
    content = _read(path)
    try:
        ssl.create_default_context(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(f"{path} holds no PEM certificates") from error
    return content


def _check_pair(certificate: Path | str, key: Path | str) -> None:
    """gRPC says nothing of a broken pair until a handshake fails; OpenSSL says it now."""
    _read(certificate), _read(key)
    try:
        # A password callback keeps OpenSSL from asking at the terminal for an encrypted key.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(f"{certificate} and {key} are no matching PEM certificate and unencrypted key") from error
