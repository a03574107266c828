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


async def deliver_in_the_future(client: Redis, stream: str, entry_id: str, ahead_ms: int = 3_600_000) -> None:
    """Have the last delivery of a stream's one pending entry lie ahead, as after the server's clock was set back.

    No command writes a time to come: the stream is dumped, changed and restored.
    """
    dumped: Any = await client.dump(stream)
    ms, seq = map(int, entry_id.split("-"))
    key = ms.to_bytes(8, "big") + seq.to_bytes(8, "big")
    # In this order: the stream's node, the group's pending entries with their times, and those of its consumer.
    at = dumped.index(key, dumped.index(key) + 1) + len(key)
    delivered_ms = int.from_bytes(dumped[at : at + 8], "little")
    body = dumped[:at] + (delivered_ms + ahead_ms).to_bytes(8, "little") + dumped[at + 8 : -8]
    await client.restore(stream, 0, body + _crc64(body).to_bytes(8, "little"), replace=True)


def _crc64(data: bytes) -> int:
    """Give the checksum of a dump: CRC-64 of Jones, reflected."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x95AC9329AC4BC9B5 if crc & 1 else 0)
    return crc
