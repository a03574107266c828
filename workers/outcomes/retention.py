"""Keeps the results stream from growing for ever, and takes nothing that somebody has still to read."""

from schemas.keys import StreamKeys
from schemas.settings import BacklogSettings
from workers.redis.connection import StreamConnection
from workers.redis.errors import stream_errors
from workers.redis.scripts import Script

_AT_ONCE = 1000
"""Most results taken off by one script: about a millisecond in which the server does nothing else."""


class RedisRetention:
    """A `Retention` on the results stream of one shard.

    Args:
        client: Of the server that has the stream.
        keys: Names it.
        backlog: Results past `keep_results` in number, the oldest first, or past `keep_results_s` in age are taken
            off. The server frees whole nodes of the stream, so where results are small a few past the number stay.
    """

    def __init__(self, client: StreamConnection, keys: StreamKeys, backlog: BacklogSettings) -> None:
        self._client = client
        self._names = [keys.results, keys.counters]
        self._policy = [backlog.keep_results, round(backlog.keep_results_s * 1000)]
        self._script = Script(client, "trim.lua")

    async def trim(self) -> int:
        """Take old results off their stream, never one that a registered group has still to read or acknowledge.

        A consumer that reads without a group is not known to the server and is not waited for. What is taken off is
        counted at the server.

        Returns:
            How many were taken off.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        total, more = 0, True
        with stream_errors(self._client):
            while more:  # each call is short, and others get their turn in between
                taken, more = await self._script(keys=self._names, args=[*self._policy, _AT_ONCE])
                total += taken
        return total
