"""A TCP proxy that cuts replies: the command arrives and is done, and whoever sent it never learns."""

import asyncio
import contextlib
from typing import Self


class CuttingProxy:
    """Forwards to a server on loopback, and now and then cuts.

    Args:
        server_port: Where to.
    """

    def __init__(self, server_port: int) -> None:
        self.port = 0
        self.cut_replies = 0
        self._server_port = server_port
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for link in list(self._links):
            link.close()

    def cut(self) -> None:
        """Have the next reply on every connection go lost, and the connection with it."""
        for link in self._links:
            link.armed = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.close()
            return
        link = _Link(writer, server_writer)
        self._links.add(link)
        try:
            await asyncio.gather(link.copy(reader, server_writer), self._answer(link, server_reader, writer))
        except (OSError, asyncio.CancelledError):  # cancelled when the program ends: nobody waits for this task
            pass
        finally:
            link.close()
            self._links.discard(link)

    async def _answer(self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if link.armed:
                self.cut_replies += 1
                break
            writer.write(data)
            await writer.drain()
        link.close()


class _Link:
    """Two connections that belong together."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.armed = False
        self._writers = writers

    async def copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        self.close()

    def close(self) -> None:
        for writer in self._writers:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                writer.close()
