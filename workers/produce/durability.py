"""Runs a script and waits until its writes are durable, as configured: on replicas, on the server's disk.

Knows how to wait on one server, behind Sentinels and in a cluster, and nothing of what was written.
"""

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from redis.asyncio import RedisCluster
from redis.exceptions import MovedError, NoPermissionError, RedisError, ResponseError

from schemas.errors import ConfigError
from schemas.settings import RedisSettings
from workers.redis.connection import StreamConnection, address
from workers.redis.errors import stream_errors
from workers.redis.scripts import Script

_T = TypeVar("_T")
_SHARE = 0.75
"""Of `timeout_s`, for all waits: the server, which checks ten times a second, must give up before the client does."""
_REDIRECTIONS = 3


class DurableScript:
    """A script whose writes are waited for.

    WAIT and WAITAOF report on the writes of their own connection, so the script runs on the same one. Any write of it,
    if only a counter, makes them wait for all that other connections wrote before.

    Args:
        client: A client of the server that runs it.
        settings: What to wait for, and how long.
        names: The script's files, as for `Script`.
    """

    def __init__(self, client: StreamConnection, settings: RedisSettings, *names: str) -> None:
        self._client = client
        self._script = Script(client, *names)
        self._replicas = settings.wait_replicas
        self._fsync = settings.wait_local_fsync
        waits = (self._replicas > 0) + self._fsync
        wait_ms = int(settings.timeout_s * 1000 * _SHARE / max(1, waits))
        self._waits: list[tuple[str | int, ...]] = []
        if self._replicas:
            self._waits.append(("WAIT", self._replicas, wait_ms))
        if self._fsync:
            self._waits.append(("WAITAOF", 1, 0, wait_ms))

    async def check(self) -> None:
        """Check that the server can wait as configured.

        Raises:
            ConfigError: It cannot.
            StreamUnavailableError: It does not answer.
        """
        if self._fsync:
            everywhere = {"target_nodes": RedisCluster.PRIMARIES} if isinstance(self._client, RedisCluster) else {}
            with stream_errors(self._client):
                try:
                    await self._client.execute_command("WAITAOF", 1, 0, 1, **everywhere)
                except ResponseError as error:
                    raise _no_fsync(self._client, error) from error

    async def __call__(
        self, keys: Sequence[str], args: Sequence[str | bytes | float], read: Callable[[Any], _T]
    ) -> tuple[_T, str]:
        """Run the script, then wait.

        Args:
            keys: The streams and other keys that it uses, a stream first.
            args: Its arguments.
            read: Parses its reply; where it raises, there is nothing to wait for.

        Returns:
            The parsed reply, and a text on what is not yet durable; empty where all is.

        Raises:
            ConfigError: The server cannot wait as configured.
        """
        if not self._waits:
            return read(await self._script(keys=keys, args=args)), ""
        command = ("EVAL", self._script.text, len(keys), *keys, *args)
        if isinstance(self._client, RedisCluster):
            reply, *waited = await self._run_in_cluster(self._client, keys[0], command)
            return read(reply), self._shortfall(waited)
        async with self._client.client() as connection:  # one of the pool, for all commands
            run: Callable[..., Awaitable[Any]] = connection.execute_command
            parsed = read(await run(*command))
            return parsed, self._shortfall([await _reply_or_error(run(*wait)) for wait in self._waits])

    async def _run_in_cluster(self, client: RedisCluster, key: str, command: tuple[Any, ...]) -> list[Any]:
        """Run on the node that has the key, in one pipeline: redirected singly, script and waits could be separated."""
        redirections = 0
        while True:
            await client.initialize()  # does nothing where the cluster's layout is known
            node = client.get_node_from_key(key)
            if node is None:
                raise ResponseError(f"CLUSTERDOWN no node has the slot of {key}")
            pipeline = client.pipeline()
            for step in (command, *self._waits):
                pipeline.execute_command(*step, target_nodes=node)
            try:
                replies = await pipeline.execute(raise_on_error=False, allow_redirections=False)
            except RedisError as error:
                replies = [error]
            if not isinstance(replies[0], RedisError):
                return replies
            # After an error only a plain command makes the client update the cluster's layout; a pipeline does not.
            with contextlib.suppress(RedisError):
                await client.xlen(key)
            redirections += 1
            if not isinstance(replies[0], MovedError) or redirections > _REDIRECTIONS:
                raise replies[0]

    def _shortfall(self, waited: list[Any]) -> str:
        lacking = []
        for wait, reply in zip(self._waits, waited, strict=True):
            if isinstance(reply, ResponseError):
                raise _no_fsync(self._client, reply) from reply
            if isinstance(reply, Exception):
                raise reply
            if wait[0] == "WAIT" and reply < self._replicas:
                lacking.append(f"{reply} of {self._replicas} replicas have it")
            elif wait[0] == "WAITAOF" and not reply[0]:
                lacking.append("it is not on the server's disk")
        return " and ".join(lacking)


async def _reply_or_error(command: Awaitable[Any]) -> Any:
    """Return a command's reply, or its error instead of raising it, as a pipeline does."""
    try:
        return await command
    except ResponseError as error:
        return error


def _no_fsync(client: StreamConnection, error: ResponseError) -> Exception:
    if isinstance(error, NoPermissionError):
        return error
    return ConfigError(
        f"the server at {address(client)} cannot wait as redis.wait_replicas and redis.wait_local_fsync ask: {error}; "
        "switch its AOF on (appendonly yes; WAITAOF needs Redis 7.2 or any Valkey), or do not ask for it"
    )
