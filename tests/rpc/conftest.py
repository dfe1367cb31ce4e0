"""A real server on a free loopback port, for the tests of penstock.rpc."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from penstock.rpc.server import Server
from rpc.serving import Serve, Unexpected


@pytest.fixture
def unexpected() -> Unexpected:
    """What servers reported to their error hook."""
    return []


@pytest.fixture
def serve(unexpected: Unexpected) -> Serve:
    """A server of its own for each use, stopped at the end."""

    @asynccontextmanager
    async def running(implementations: dict[str, object], **options: object) -> AsyncIterator[str]:
        server = Server(
            "127.0.0.1:0",
            on_error=lambda method, error: unexpected.append((method, error)),
            **options,  # type: ignore[arg-type]
        )
        for service, implementation in implementations.items():
            server.add(service, implementation)
        address = await server.start()
        try:
            yield address
        finally:
            await server.stop(0)

    return running
