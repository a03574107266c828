"""Checks that the stream server keeps what it has confirmed: eviction, append-only file, fsync."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import RedisCluster
from redis.exceptions import NoPermissionError, ResponseError

from schemas.errors import ConfigError
from workers.redis.connection import StreamConnection, address
from workers.redis.errors import stream_errors

_NO_EVICTION = "noeviction"
_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Persistence:
    """What one server does with data that it has confirmed. None: this user may not ask, or the server has no CONFIG.

    Attributes:
        server: Its address.
        eviction: `maxmemory-policy`.
        max_memory_bytes: `maxmemory`; 0 is no bound.
        aof: Whether it writes an append-only file.
        fsync: `appendfsync`.
    """

    server: str
    eviction: str | None = None
    max_memory_bytes: int | None = None
    aof: bool | None = None
    fsync: str | None = None

    @property
    def evicts_streams(self) -> bool:
        """Return whether it deletes whole streams when it is full."""
        return bool(self.max_memory_bytes) and (self.eviction or "").startswith("allkeys-")

    def describe(self) -> str:
        """Return the values on one line."""
        aof = _UNKNOWN if self.aof is None else ("yes" if self.aof else "no")
        return f"maxmemory-policy {self.eviction or _UNKNOWN}, appendonly {aof}, appendfsync {self.fsync or _UNKNOWN}"

    def warnings(self) -> list[str]:
        """Return what may be lost, each with its cure; empty also where nothing is known."""
        found = []
        if self.eviction not in (None, _NO_EVICTION):
            found.append(
                f"the server at {self.server} has the maxmemory-policy {self.eviction} and, when full, deletes keys "
                "like those that recognise repeated pushes: redis-cli CONFIG SET maxmemory-policy noeviction"
            )
        if self.aof is False:
            found.append(
                f"the server at {self.server} writes no append-only file: when it ends, images since its last snapshot "
                "are lost: redis-cli CONFIG SET appendonly yes"
            )
        elif self.aof and self.fsync == "no":
            found.append(
                f"the server at {self.server} does not wait for its append-only file to be on the disk: a power cut "
                "loses what was not there: redis-cli CONFIG SET appendfsync everysec, or always"
            )
        return found


async def require_no_eviction(client: StreamConnection) -> list[Persistence]:
    """Check that no server of the streams deletes them when it is full.

    Returns:
        What each primary does with its data; a server that this user may not ask counts as one that keeps it.

    Raises:
        ConfigError: A server evicts streams.
        StreamUnavailableError: A server does not answer.
    """
    with stream_errors(client):
        found = await _read_all(client)
    for server in found:
        if server.evicts_streams:
            raise ConfigError(
                f"the server at {server.server} has the maxmemory-policy {server.eviction}: when it is full it deletes "
                "whole streams, with images whose push was confirmed; set noeviction, in its configuration too (of a "
                "managed server in its parameters): redis-cli CONFIG SET maxmemory-policy noeviction"
            )
    return found


def all_warnings(servers: Sequence[Persistence]) -> list[str]:
    """Return the warnings about all servers."""
    return [warning for server in servers for warning in server.warnings()]


async def _read_all(client: StreamConnection) -> list[Persistence]:
    if not isinstance(client, RedisCluster):
        return [await _read(client, address(client))]
    await client.initialize()
    return [await _read(client, node.name, target_nodes=node) for node in client.get_primaries()]


async def _read(client: StreamConnection, server: str, **target: Any) -> Persistence:
    try:
        info: dict[str, Any] = await client.info("memory", "persistence", **target)
    except NoPermissionError:
        return Persistence(server)
    try:
        config: dict[Any, Any] = await client.config_get("appendfsync", **target)
    except ResponseError:  # no right to it, or a managed server, which has no CONFIG
        config = {}
    return Persistence(
        server,
        eviction=info.get("maxmemory_policy"),
        max_memory_bytes=info.get("maxmemory"),
        aof=bool(info["aof_enabled"]) if "aof_enabled" in info else None,
        fsync=config.get("appendfsync"),
    )
