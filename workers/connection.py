"""The connection to the stream server, and the one place where the client's exceptions become ours.

Knows Redis and nothing of what is on the streams.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1
from importlib.resources import files
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from schemas.errors import ConfigError, StreamUnavailableError
from schemas.settings import RedisSettings

Row = tuple[str, dict[bytes, bytes]]
"""An entry's id, and its fields; an entry that was deleted has none."""

StreamConnection = Redis | RedisCluster
"""A client of one server, of the primary that Sentinels name, or of a cluster."""

_CREATE_GROUP = """#!lua flags=allow-oom
return redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
"""
_OLDEST_SERVER = 7
_PASSING = (
    RedisConnectionError,  # also: loading its data, wrong password, no free connection
    RedisTimeoutError,
    ReadOnlyError,
    ClusterDownError,
    TryAgainError,
)
_PASSING_CODES = ("BUSY ", "MISCONF ", "NOREPLICAS ", "UNBLOCKED ", "UNKILLABLE ")


def make_client(settings: RedisSettings) -> Redis:
    """Make a client; it connects when it is first used.

    It never repeats a command by itself: a repeated XADD writes twice. A command that waits at the server takes a
    connection of the pool for itself, so it holds up no other.

    Raises:
        ConfigError: The URL cannot be read.
    """
    scheme = urlsplit(settings.url).scheme
    if scheme not in ("redis", "rediss"):
        raise ConfigError(f"redis.url has the scheme {scheme!r}; write redis://host:port/0, or rediss:// for TLS")
    try:
        return Redis.from_url(
            settings.url,
            username=settings.username,
            password=settings.password.get_secret_value() if settings.password else None,
            socket_timeout=settings.timeout_s,
            socket_connect_timeout=settings.timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            legacy_responses=False,
            decode_responses=False,
        )
    except ValueError as error:  # its text may repeat the URL, and a URL may hold a password
        raise ConfigError(
            f"redis.url cannot be read ({type(error).__name__}); write redis://host:port/0, or rediss:// for TLS"
        ) from None


def address(client: Redis) -> str:
    """Name the server as host:port."""
    options = client.connection_pool.connection_kwargs
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"


async def require_server(client: Redis) -> None:
    """See that the server answers and is one that runs our scripts.

    Raises:
        ConfigError: It is older than version 7, or refuses the user.
        StreamUnavailableError: It does not answer.
    """
    try:
        with stream_errors(client):
            info = await client.info("server")
    except ConfigError as error:
        if isinstance(error.__cause__, NoPermissionError):
            return  # INFO is withheld from this user; the first script will tell
        raise
    version = str(info.get("redis_version", "0"))
    if int(version.split(".", maxsplit=1)[0]) < _OLDEST_SERVER:
        raise ConfigError(
            f"the server at {address(client)} is Redis {version} and flawstream needs {_OLDEST_SERVER} or later, "
            "or any Valkey; point redis.url at a newer one, or leave it out to run the embedded server"
        )


def load_script(name: str) -> str:
    """Read one of the scripts that run at the server."""
    return (files("workers") / name).read_text(encoding="utf-8")


class Script:
    """One of the scripts that run at the server, for every kind of client: `await script(keys=[...], args=[...])`.

    It is sent by its digest, and as a whole once where the server does not know it, which is before anything has run.
    In a cluster it runs where its keys are, which must all be in one slot.

    Args:
        client: Of the server that runs it.
        names: The file's name in this package; of several, put together in this order.
    """

    def __init__(self, client: StreamConnection, *names: str) -> None:
        self._client = client
        self._text = "".join(map(load_script, names))
        self._digest = sha1(self._text.encode()).hexdigest()  # noqa: S324 - the server's name for it, no secret

    async def __call__(self, *, keys: Sequence[str], args: Sequence[str | bytes | float]) -> Any:
        """Run it.

        Args:
            keys: The streams and other keys it touches.
            args: What else it is told.

        Returns:
            What it answers.
        """
        values = (len(keys), *keys, *args)
        try:
            return await self._client.evalsha(self._digest, *values)  # type: ignore[arg-type]  # bytes are sent as they are
        except NoScriptError:
            return await self._client.eval(self._text, *values)  # type: ignore[arg-type]  # the same


def rows(reply: Any) -> list[Row]:
    """Give the entries of a reply their types; the client's own are a union of all that any option may yield."""
    return [(entry_id.decode(), fields) for entry_id, fields in reply]


def is_missing_group(error: ResponseError) -> bool:
    """Tell whether a reply says that the stream or its consumer group is not there."""
    return str(error).startswith("NOGROUP")


async def create_group(client: Redis, stream: str, group: str) -> None:
    """Create a consumer group at the stream's start: one created at its end loses what came before.

    By a script, as the plain command is refused by a server at its memory limit, which then nobody could drain.
    """
    try:
        await client.eval(_CREATE_GROUP, 1, stream, group)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):  # another was first
            raise


async def read_group(
    client: Redis, stream: str, group: str, consumer: str, *, cursor: str, max_entries: int, block_ms: int | None
) -> list[Row]:
    """Read entries as a consumer of a group, which is made where it is not there.

    Args:
        client: Of the server that has the stream.
        stream: Its name.
        group: The group's name.
        consumer: The consumer's name in the group.
        cursor: `>` for new entries, or the id behind which to give those again that are pending for the consumer.
        max_entries: At most so many.
        block_ms: How long to wait at the server for a new entry; None does not wait.
    """

    async def read() -> list[Row]:
        reply: Any = await client.xreadgroup(group, consumer, {stream: cursor}, count=max_entries, block=block_ms)
        return rows(reply.get(stream.encode(), ()))

    try:
        return await read()
    except ResponseError as error:
        if not is_missing_group(error):
            raise
    await create_group(client, stream, group)
    return await read()


class StreamClient:
    """Something with a connection of its own, opened and closed; an `async with` does both.

    Args:
        settings: Where the server is.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._client = make_client(settings)

    async def open(self) -> None:
        """See that the server answers and can run our scripts.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: It is too old, or refuses the user.
        """
        await require_server(self._client)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@contextmanager
def stream_errors(client: Redis) -> Iterator[None]:
    """Turn the client's exceptions into ours.

    Raises:
        StreamUnavailableError: The server does not answer, or not now.
        ConfigError: The user or the password is refused, or the user lacks a right.
    """
    try:
        yield
    except AuthenticationError as error:
        raise ConfigError(
            f"the server at {address(client)} refuses the user or the password; set redis.username and redis.password"
        ) from error
    except NoPermissionError as error:
        raise ConfigError(f"the server at {address(client)} refuses: {error}; grant it to the user") from error
    except OutOfMemoryError as error:
        raise StreamUnavailableError(
            f"the server at {address(client)} is out of memory and takes no writes; "
            "let the workers drain it, or raise its maxmemory"
        ) from error
    except _PASSING as error:
        raise StreamUnavailableError(_unavailable(client, error)) from error
    except ResponseError as error:
        if str(error).startswith(_PASSING_CODES):
            raise StreamUnavailableError(_unavailable(client, error)) from error
        raise


def _unavailable(client: Redis, error: RedisError) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"the stream server at {address(client)} does not answer ({reason}); "
        "see that it runs and that redis.url names it"
    )
