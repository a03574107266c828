"""A connection that is closed while a command is written to it is a server that does not answer, and no bug of ours."""

import asyncio
from pathlib import Path

import pytest
from helpers.redis_servers import Server, running
from redis.asyncio import Redis

from schemas.errors import StreamUnavailableError
from schemas.settings import RedisSettings
from workers.redis.connection import make_client
from workers.redis.errors import stream_errors

pytestmark = pytest.mark.anyio

MOMENTS = 12
"""Turns of the event loop after which it is closed: from before the command is written to after it."""


async def test_a_connection_closed_at_any_moment_of_a_command_is_a_server_that_does_not_answer(tmp_path: Path) -> None:
    server = Server(tmp_path)
    cut_off: list[str] = []
    with running(server):
        async with make_client(RedisSettings().model_copy(update={"url": server.url})) as client:
            assert isinstance(client, Redis)
            for moment in range(MOMENTS):
                connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
                command = asyncio.ensure_future(connection.send_command("PING"))
                for _ in range(moment):
                    await asyncio.sleep(0)
                await connection.disconnect(nowait=True)
                try:
                    with stream_errors(client):
                        await command
                except StreamUnavailableError as error:
                    cut_off.append(str(error))
                await client.connection_pool.release(connection)
    assert any("closed while it was written to" in one for one in cut_off)
