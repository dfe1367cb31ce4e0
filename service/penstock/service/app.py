"""One service process, put together: what it holds, how it begins, how it ends."""

import asyncio
import os
import secrets
from functools import partial
from typing import Final

from penstock.rpc import reflection
from penstock.rpc.channel import open_channel
from penstock.rpc.health import OVERALL, Health
from penstock.rpc.server import BindError, Server
from penstock.rpc.tls import channel_credentials, server_credentials
from penstock.service import adapters, errors, generation, models
from penstock.service.adapters import Adapters
from penstock.service.admission import Admission
from penstock.service.auth import ApiKeys, Authenticator, OpenAccess
from penstock.service.catalogue import Catalogue, Tokenizers
from penstock.service.config import ServiceConfig
from penstock.service.fleet import Fleet
from penstock.service.front import Front
from penstock.service.generation import Generation
from penstock.service.intake import Intake
from penstock.service.link import Link, LinkSettings
from penstock.service.models import Models
from penstock.service.router import LeastLoaded
from penstock.service.text.pool import EncodePool
from penstock.telemetry.logging import get_logger
from penstock.telemetry.tracing import Tracing

NO_PROXY: Final = (("grpc.enable_http_proxy", 0),)
"""Schedulers are neighbours: http_proxy is not meant for them."""
BLIP_SECONDS: Final = 0.5
"""For which health says nothing of a stream that is being replaced."""
REACH_SECONDS: Final = 2.0
"""For which a process that shares its port looks for a scheduler before it takes connections from the others."""
CANCEL_SECONDS: Final = 0.2
"""For handlers that are cut off, for their cancels and for the last acknowledgements to reach the schedulers."""

log = get_logger(__name__)


class Service:
    """Made and used on one event loop. Raises `ValueError` for API keys or TLS files that cannot be used."""

    def __init__(self, config: ServiceConfig, tracing: Tracing) -> None:
        self._config = config
        self._admission = Admission(config.max_requests)
        self._pool = EncodePool(threads=config.encode_threads)
        tokenizers = Tokenizers()
        self._links = self._make_links(tokenizers)
        self.fleet = Fleet(self._links, LeastLoaded(), Catalogue(self._links, tokenizers))
        self._server = self._make_server(tracing)
        self._blip: asyncio.TimerHandle | None = None
        self._health = Health()
        self._health.attach(self._server)
        reflection.enable(self._server)
        self._tasks: list[asyncio.Task[None]] = []
        self._serving = False

    def _make_links(self, tokenizers: Tokenizers) -> tuple[Link, ...]:
        config = self._config
        ca = config.scheduler_ca
        credentials = None if ca is None else channel_credentials(ca)
        service_id = f"service-{os.getpid()}-{secrets.token_hex(4)}"
        return tuple(
            Link(
                address,
                service_id=service_id,
                tokenizers=tokenizers,
                settings=LinkSettings(config.silence, config.session_grace),
                open_channel=partial(open_channel, credentials=credentials, options=NO_PROXY),
                on_change=self._changed,
            )
            for address in config.schedulers
        )

    def _make_server(self, tracing: Tracing) -> Server:
        config = self._config
        credentials = None
        if config.tls_certificate is not None and config.tls_key is not None:
            credentials = server_credentials(config.tls_certificate, config.tls_key)
        server = Server(
            config.grpc_address,
            credentials=credentials,
            on_error=_log_failure,
            max_message_bytes=config.max_message_bytes,
            options=(("grpc.so_reuseport", int(config.reuse_port)),),
        )
        authenticator: Authenticator = ApiKeys(config.api_keys) if config.api_keys else OpenAccess()
        tracer = tracing.tracer("penstock.service")
        front = Front(authenticator, self._admission, tracer)
        # Questions about models have places of their own: they are answered however busy generation is.
        asking = Front(authenticator, Admission(config.max_requests), tracer)
        server.add(generation.SERVICE, Generation(front, Intake(self.fleet, self._pool)))
        server.add(models.SERVICE, Models(asking, self.fleet.catalogue, self._pool))
        server.add(adapters.SERVICE, Adapters(asking))
        return server

    async def start(self) -> str:
        """Listen and reach for the schedulers; returns the address. Raises `BindError`."""
        self._tasks = [asyncio.create_task(link.run(), name=f"link {link.address}") for link in self._links]
        if self._config.reuse_port:
            await self.fleet.reached(REACH_SECONDS)
        try:
            address = await self._server.start()
        except BindError:
            await self._end_links()
            raise
        self._serving = True
        self._health.set(models.SERVICE, True)
        self._health.set(adapters.SERVICE, True)
        self._tell_health()
        log.info("service.listening", address=address, schedulers=list(self._config.schedulers))
        return address

    async def drain(self) -> None:
        """Refuse new requests and finish those that run, within the grace; then end. Called once, after `start`."""
        self._serving = False
        self._health.set_all(False)
        self._admission.drain()
        log.info("service.draining", running=self._admission.running)
        finished = await self._admission.idle(self._config.drain_grace)
        if not finished:
            log.warning("service.cut_off", running=self._admission.running)
            self.fleet.interrupt(errors.draining())
        await self._server.stop(CANCEL_SECONDS)
        if not finished:
            await asyncio.sleep(CANCEL_SECONDS)
        await self.fleet.settle(CANCEL_SECONDS)
        await self._end_links()
        self._pool.close()
        log.info("service.ended")

    async def _end_links(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def failed(self) -> None:
        """Wait for what must never happen: a link's task that ends. Raises what it ended with."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    def _changed(self) -> None:
        self.fleet.wake()
        self._tell_health()

    def _tell_health(self) -> None:
        """Say it at once, but of a stream that is being replaced only when that takes long: requests wait for it."""
        if self._serving and not self.fleet.usable and self.fleet.reconnecting:
            if self._blip is None:
                self._blip = asyncio.get_running_loop().call_later(BLIP_SECONDS, self._set_health)
        else:
            self._set_health()

    def _set_health(self) -> None:
        if self._blip is not None:
            self._blip.cancel()
            self._blip = None
        usable = self._serving and self.fleet.usable
        self._health.set(generation.SERVICE, usable)
        self._health.set(OVERALL, usable)


def _log_failure(method: str, error: BaseException) -> None:
    log.error("call.failed", method=method, exc_info=error)
