"""Trims the results stream, but nothing that a registered group has still to read."""

from schemas.keys import StreamKeys
from schemas.settings import BacklogSettings
from workers.redis.connection import StreamConnection
from workers.redis.errors import stream_errors
from workers.redis.scripts import Script

_AT_ONCE = 1000
"""Most results trimmed by one script: the server does nothing else for about a millisecond."""


class RedisRetention:
    """A `Retention` on the results stream of one shard.

    Args:
        client: A client of the stream's server.
        keys: Names of the stream and its counters.
        backlog: Results past `keep_results` in number, the oldest first, or past `keep_results_s` in age are trimmed.
            The server frees whole nodes of the stream, so where results are small a few past the number stay.
    """

    def __init__(self, client: StreamConnection, keys: StreamKeys, backlog: BacklogSettings) -> None:
        self._client = client
        self._names = [keys.results, keys.counters]
        self._policy = [backlog.keep_results, round(backlog.keep_results_s * 1000)]
        self._script = Script(client, "trim.lua")

    async def trim(self) -> int:
        """Remove old results, never one that a registered group has still to read or acknowledge.

        A reader without a group is unknown to the server, and not waited for. The server counts what is removed.

        Returns:
            How many were removed.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        total, more = 0, True
        with stream_errors(self._client):
            while more:  # each call is short: the server serves others in between
                removed, more = await self._script(keys=self._names, args=[*self._policy, _AT_ONCE])
                total += removed
        return total
