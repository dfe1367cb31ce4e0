"""What an operator can set for the service."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from penstock.rpc.tls import is_loopback, require_secure

MIB = 1 << 20


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one service process. Raises `ValueError` for settings that contradict one another."""

    grpc_address: Annotated[str, Meta(description="Where to listen; port 0 takes a free one.")] = "127.0.0.1:50051"
    service_processes: Annotated[
        int,
        Meta(ge=1, le=64, description="Processes that share the port. Limits, such as max_requests, are of each."),
    ] = 1
    reuse_port: Annotated[
        bool, Meta(description="Share the port with other processes of this user that do so, too (SO_REUSEPORT).")
    ] = False
    schedulers: Annotated[tuple[str, ...], Meta(description="Addresses of the schedulers.")] = ("127.0.0.1:50052",)
    api_keys: Annotated[
        tuple[str, ...],
        Meta(description="Keys of callers, each KEY or TENANT:KEY. None: everybody, on loopback only."),
    ] = ()
    max_requests: Annotated[int, Meta(ge=1, description="Requests served at once; more are RESOURCE_EXHAUSTED.")] = 1024
    max_message_bytes: Annotated[int, Meta(ge=1024, description="Largest request.")] = 4 * MIB
    encode_threads: Annotated[int, Meta(ge=1, le=64, description="Threads that encode prompts.")] = 2
    silence: Annotated[
        float, Meta(gt=0, description="Seconds without a word after which a scheduler's channel is replaced.")
    ] = 1.0
    session_grace: Annotated[
        float, Meta(gt=0, description="Seconds for which streams wait for a scheduler that cannot be reached.")
    ] = 10.0
    drain_grace: Annotated[
        float, Meta(ge=0, description="Seconds that running requests get when the service is told to end.")
    ] = 10.0
    otlp_endpoint: Annotated[
        str | None, Meta(description="Where traces go: URL or host:port of an OTLP gRPC receiver.")
    ] = None
    trace_sample_ratio: Annotated[
        float, Meta(ge=0, le=1, description="Share of the traces begun here that are kept.")
    ] = 1.0
    tls_certificate: Annotated[Path | None, Meta(description="PEM certificate chain to serve with.")] = None
    tls_key: Annotated[Path | None, Meta(description="PEM private key of that certificate.")] = None
    scheduler_ca: Annotated[
        Path | None, Meta(description="PEM certificates that vouch for the schedulers; none: plaintext.")
    ] = None
    allow_plaintext: Annotated[
        bool, Meta(description="Let plaintext leave this machine, for a network that is trusted.")
    ] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level that is logged.")
    ] = "info"
    ready_fd: Annotated[
        int | None, Meta(description="Descriptor that gets one JSON line when the service listens.")
    ] = None
    parent_pid: Annotated[int | None, Meta(description="Process to end with.")] = None

    def __post_init__(self) -> None:
        if not self.schedulers:
            raise ValueError("schedulers: at least one address is needed")
        if len(set(self.schedulers)) != len(self.schedulers):
            raise ValueError("schedulers: an address is given twice")
        for address in self.schedulers:
            _check_address("schedulers", address)
            require_secure(address, self.scheduler_ca, self.allow_plaintext)
        _check_address("grpc_address", self.grpc_address)
        if self.grpc_address.startswith("unix") and (self.service_processes > 1 or self.reuse_port):
            raise ValueError("grpc_address: processes can share a TCP port, not a Unix socket")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: give both or neither")
        if not self.api_keys and not is_loopback(self.grpc_address):
            raise ValueError(f"grpc_address {self.grpc_address} is not loopback: api_keys are needed")
        require_secure(self.grpc_address, self.tls_certificate, self.allow_plaintext)


def _check_address(name: str, address: str) -> None:
    if address.startswith(("unix:", "unix-abstract:")):
        return
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError(f"{name}: {address!r} is not HOST:PORT")
