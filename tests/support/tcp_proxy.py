"""A TCP proxy in user space that can cut, refuse, or swallow a connection."""

import asyncio
import contextlib
import socket
import struct


class TcpProxy:
    """Forwards connections to ``target``. All faults act on this proxy's side of the wire."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._port = 0
        self.connections = 0

    async def start(self) -> str:
        """Listen; returns the address."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return f"127.0.0.1:{self._port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, upstream_writer}
        for source, sink in ((reader, upstream_writer), (upstream_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await self._flowing.wait()
                sink.write(data)
                await sink.drain()
        sink.close()
        self._writers.discard(sink)

    def reset(self) -> None:
        """Reset every connection (RST)."""
        for writer in list(self._writers):
            raw = writer.get_extra_info("socket")
            if raw is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()

    async def refuse(self) -> None:
        """Reset every connection and take no new ones until start is called again."""
        assert self._server is not None
        self._server.close()
        self.reset()
        await self._server.wait_closed()

    def silence(self) -> None:
        """Swallow all bytes while connections stay open, until speak."""
        self._flowing.clear()

    def speak(self) -> None:
        """Let the bytes flow again."""
        self._flowing.set()

    async def stop(self) -> None:
        """End everything."""
        self.speak()
        await self.refuse()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
