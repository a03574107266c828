"""The heartbeats by which the workers of a sharded stream know of each other. Knows Redis, and not who reads what."""

from collections.abc import Mapping

from schemas.keys import StreamKeys
from workers.redis.connection import StreamConnection
from workers.redis.errors import stream_errors
from workers.redis.scripts import Script


class ShardMembers:
    """One worker's place among the workers of a sharded stream: a counter in one hash.

    Args:
        client: A client of the stream server or cluster.
        keys: Names of the keys of one shard, the same for every worker.
        worker: The worker's name.
    """

    def __init__(self, client: StreamConnection, keys: StreamKeys, worker: str) -> None:
        self._client = client
        self._key = keys.workers
        self._worker = worker
        self._script = Script(client, "shard_heartbeat.lua")

    async def heartbeat(self, dead: Mapping[str, int]) -> dict[str, int]:
        """Count one heartbeat.

        Args:
            dead: Workers to be removed, with their counters; one whose counter has moved stays.

        Returns:
            The counters of all workers, by name.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        args: list[str | bytes | float] = [self._worker]
        for name, counter in dead.items():
            args += (name, counter)
        with stream_errors(self._client):
            reply: list[bytes] = await self._script(keys=[self._key], args=args)
        return {name.decode(): int(counter) for name, counter in zip(reply[::2], reply[1::2], strict=True)}

    async def leave(self) -> None:
        """Delete the counter, so that the other workers read this one's shards at their next heartbeat.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            await self._client.hdel(self._key, self._worker)
