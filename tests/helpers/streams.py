"""Streams of a single server, through redis-py, with types that say what there is: bytes."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from schemas.settings import RedisSettings
from workers.redis.connection import StreamConnection, make_client

Fields = dict[bytes, bytes]


@asynccontextmanager
async def single_client(settings: RedisSettings) -> AsyncIterator[Redis]:
    """Connect to a server that is no cluster."""
    async with make_client(settings) as client:
        assert isinstance(client, Redis)
        yield client


async def rows(client: StreamConnection, stream: str) -> list[tuple[str, Fields]]:
    """Give all entries of a stream: ids and fields."""
    found: Any = await client.xrange(stream)
    return [(entry_id.decode(), fields) for entry_id, fields in found]


async def add(client: StreamConnection, stream: str, fields: Mapping[Any, Any], *, entry_id: str = "*") -> str:
    """Add an entry; gives its id."""
    written: Any = await client.xadd(stream, dict(fields), id=entry_id)
    return str(written.decode())
