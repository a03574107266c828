"""Keeps the results stream from growing for ever, and takes nothing that somebody has still to read."""

from redis.asyncio import Redis

from schemas.keys import StreamKeys
from workers.connection import load_script, stream_errors


class RedisRetention:
    """A `Retention` on a Redis stream.

    Args:
        client: Of the server that has the results stream.
        keys: Names the stream.
        keep_results: Results past this number are taken off, the oldest first. The server frees whole nodes of the
            stream, so where results are small a few more stay.
    """

    def __init__(self, client: Redis, keys: StreamKeys, keep_results: int) -> None:
        self._client = client
        self._results = keys.results
        self._keep_results = keep_results
        self._script = client.register_script(load_script("retention.lua"))

    async def trim(self) -> int:
        """Take old results off their stream, never one that a registered group has still to read.

        A consumer that reads without a group is not known to the server and is not waited for.

        Returns:
            How many were taken off.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            return int(await self._script(keys=[self._results], args=[self._keep_results]))
