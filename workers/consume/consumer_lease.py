"""The lease on a consumer name: one live worker at a time has it. Knows Redis, and not what the worker reads."""

import asyncio
import logging
import os
import secrets
import socket

from schemas.errors import ConfigError, FlawstreamError
from schemas.keys import StreamKeys
from workers.consume.shard_leases import HEARTBEAT_S, MISSED_HEARTBEATS
from workers.redis.connection import StreamConnection
from workers.redis.errors import stream_errors
from workers.redis.scripts import Script

LEASE_S = HEARTBEAT_S * (MISSED_HEARTBEATS + 1)
"""A dead worker has its name for so long, at most."""

_log = logging.getLogger(__name__)


class ConsumerLease:
    """One worker's lease on its consumer name: a key that expires, and that every heartbeat renews.

    Args:
        client: A client of the stream server or cluster.
        keys: Names of the keys of one shard, the same for every worker.
        consumer: The name.
    """

    def __init__(self, client: StreamConnection, keys: StreamKeys, consumer: str) -> None:
        self._client = client
        self._key = keys.lease(consumer)
        self._consumer = consumer
        self._worker = f"host {socket.gethostname()}, pid {os.getpid()}, {secrets.token_hex(4)}"
        self._script = Script(client, "hold_lease.lua")

    async def take(self) -> None:
        """Take the lease. Where another worker has it, wait until that of a dead one has expired.

        With access rules of a release before this one there is no lease; `hold` warns of it.

        Raises:
            ConfigError: A live worker has it.
            StreamUnavailableError: The server does not answer.
        """
        for missed in range(MISSED_HEARTBEATS + 2):
            if missed:
                await asyncio.sleep(HEARTBEAT_S)
            try:
                holder = await self._hold()
            except ConfigError:
                return
            if holder == self._worker:
                return
        raise self._in_use(holder)

    async def hold(self, stop: asyncio.Event) -> None:
        """Renew the lease until cancelled. One that has expired is taken again, unless another worker was first.

        Args:
            stop: Set where another worker has it: this one must not read any more.

        Raises:
            ConfigError: Another worker has it.
        """
        failed = False
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                holder = await self._hold()
            except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
                if not failed:
                    _log.warning(
                        "the lease on the consumer name %r cannot be renewed; another worker of this name would not be "
                        "noticed: %s",
                        self._consumer,
                        error,
                        exc_info=None if isinstance(error, FlawstreamError) else error,
                    )
                failed = True
                continue
            failed = False
            if holder != self._worker:
                stop.set()
                raise self._in_use(holder)

    async def release(self) -> None:
        """End the lease, unless another worker has it; where that fails, it expires."""
        try:
            await self._hold(left_ms=1)
        except FlawstreamError as error:
            _log.warning("releasing the consumer name %r: %s: %s", self._consumer, error.code, error)

    async def _hold(self, left_ms: int | None = None) -> str:
        """Take or renew the lease where no other worker has it; return the worker that has it."""
        lease_ms = round(LEASE_S * 1000)
        with stream_errors(self._client):
            holder: bytes = await self._script(keys=[self._key], args=[self._worker, lease_ms, left_ms or lease_ms])
        return holder.decode(errors="replace")

    def _in_use(self, holder: str) -> ConfigError:
        return ConfigError(
            f"the consumer name {self._consumer!r} is in use by another live worker ({holder.rpartition(', ')[0]}); "
            "give each worker a name of its own with --name or worker.name, or stop that one"
        )
