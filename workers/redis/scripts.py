"""What is done over a connection to the stream server, and the one place where the client's exceptions become ours.

Knows Redis and nothing of what is on the streams. `workers.redis.clients` makes the connection.
"""

import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1
from importlib.resources import files
from traceback import walk_tb
from types import TracebackType
from typing import Any, Self, TypeVar

from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    ClusterError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    SlotNotCoveredError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from schemas.errors import ConfigError, FlawstreamError, StreamUnavailableError
from schemas.settings import RedisSettings
from workers.redis.clients import PasswordFileError, StreamConnection, address, make_client

__all__ = [
    "Row",
    "Script",
    "StreamClient",
    "StreamConnection",
    "address",
    "create_group",
    "in_group",
    "is_missing_group",
    "make_client",
    "read_group",
    "require_server",
    "rows",
    "stream_errors",
]

_T = TypeVar("_T")

Row = tuple[str, dict[bytes, bytes]]
"""An entry's id, and its fields; an entry that was deleted has none."""

_CREATE_GROUP = """#!lua flags=allow-oom
return redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
"""
_OLDEST_SERVER = 7
_PASSING = (
    RedisConnectionError,  # also: loading its data, no free connection, no primary known to any Sentinel
    RedisTimeoutError,
    ReadOnlyError,  # it was the primary until just now
    ClusterDownError,
    ClusterError,  # sent from server to server until it gave up
    SlotNotCoveredError,
    AskError,  # also: moved
    TryAgainError,
)
_PASSING_CODES = ("BUSY ", "LOADING ", "MASTERDOWN ", "MISCONF ", "NOREPLICAS ", "UNBLOCKED ", "UNKILLABLE ")
_NO_NODE = ("Redis Cluster cannot be connected", "All slots are not covered", "startup_nodes could not agree")


async def require_server(client: StreamConnection) -> None:
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


class Script:
    """One of the scripts that run at the server, for every kind of client: `await script(keys=[...], args=[...])`.

    It is sent by its digest, and as a whole once where the server does not know it, which is before anything has run.
    In a cluster it runs where its keys are, which must all be in one slot.

    Args:
        client: Of the server that runs it.
        names: The file's name in this package; of several, put together in this order.

    Attributes:
        text: The script itself.
    """

    def __init__(self, client: StreamConnection, *names: str) -> None:
        self._client = client
        self.text = "".join((files("workers.redis") / "lua" / name).read_text(encoding="utf-8") for name in names)
        self._digest = sha1(self.text.encode()).hexdigest()  # noqa: S324 - the server's name for it, no secret

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
            return await self._client.eval(self.text, *values)  # type: ignore[arg-type]  # the same


def rows(reply: Any) -> list[Row]:
    """Give the entries of a reply their types; the client's own are a union of all that any option may yield."""
    return [(entry_id.decode(), fields) for entry_id, fields in reply]


def is_missing_group(error: ResponseError) -> bool:
    """Tell whether a reply says that the stream or its consumer group is not there."""
    return str(error).startswith("NOGROUP")


async def create_group(client: StreamConnection, stream: str, group: str) -> None:
    """Create a consumer group at the stream's start: one created at its end loses what came before.

    By a script, as the plain command is refused by a server at its memory limit, which then nobody could drain.
    """
    try:
        await client.eval(_CREATE_GROUP, 1, stream, group)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):  # another was first
            raise


async def in_group(client: StreamConnection, stream: str, group: str, read: Callable[[], Awaitable[_T]]) -> _T:
    """Do what reads as a consumer of a group; where the group is not there, make it and do it again."""
    try:
        return await read()
    except ResponseError as error:
        if not is_missing_group(error):
            raise
    await create_group(client, stream, group)
    return await read()


async def read_group(
    client: StreamConnection,
    stream: str,
    group: str,
    consumer: str,
    *,
    cursor: str,
    max_entries: int,
    block_ms: int | None,
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

    return await in_group(client, stream, group, read)


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
def stream_errors(client: StreamConnection) -> Iterator[None]:
    """Turn the client's exceptions into ours.

    Raises:
        StreamUnavailableError: The server does not answer, or not now.
        ConfigError: The user, the password or a certificate is refused, or the user lacks a right.
    """
    try:
        yield
    except (RedisError, RedisClusterException) as error:
        ours = _as_ours(client, error)
        if ours is None:
            raise
        raise ours from error
    except (AttributeError, TypeError) as error:
        if not _closed_in_writing(error):
            raise
        raise _unavailable(client, RedisConnectionError("the connection was closed while it was written to")) from error


def _as_ours(client: StreamConnection, error: BaseException) -> FlawstreamError | None:
    """Say what it means to us; nothing where it is a bug of ours."""
    if isinstance(error, RedisClusterException) and str(error).startswith(_NO_NODE):
        return _without_cluster(client, error)
    return _refusal(client, error) or _passing(client, error)


def _refusal(client: StreamConnection, error: BaseException) -> ConfigError | None:
    """Tell whom or what the server, or our own end, does not let through: a matter of configuration."""
    where = address(client)
    why: str | None = None
    match error:
        case PasswordFileError():
            why = str(error)
        case AuthenticationError():
            why = f"the server at {where} refuses the user or the password; set redis.username and redis.password"
        case NoPermissionError():
            why = f"the server at {where} refuses: {error}; grant it to the user"
        case RedisConnectionError() if reason := _refused_tls(error.__context__):
            why = (
                f"no TLS connection to the server at {where}: {reason}; see redis.tls_ca_file, redis.tls_cert_file, "
                "and that the server's certificate has the name in redis.url"
            )
    return ConfigError(why) if why else None


def _passing(client: StreamConnection, error: BaseException) -> StreamUnavailableError | None:
    """Tell that the server may well do it later."""
    if isinstance(error, OutOfMemoryError):
        return StreamUnavailableError(
            f"the server at {address(client)} is out of memory and takes no writes; "
            "let the workers drain it, or raise its maxmemory"
        )
    if isinstance(error, _PASSING) or (isinstance(error, ResponseError) and str(error).startswith(_PASSING_CODES)):
        return _unavailable(client, error)
    return None


def _closed_in_writing(error: BaseException) -> bool:
    """Tell whether the client stumbled over a connection that another task, or the server, had just closed.

    It then touches what is no longer there and raises none of its own errors (github.com/redis/redis-py/issues/4287).
    """
    return any(frame.f_code.co_name == "_send_packed_command" for frame, _ in walk_tb(error.__traceback__))


def _refused_tls(cause: BaseException | None) -> str | None:
    """Give the reason where two ends have met that do not trust each other, or one that speaks no TLS."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return (cause.reason or str(cause)).replace("_", " ").lower()
    return None


def _without_cluster(client: StreamConnection, error: RedisClusterException) -> FlawstreamError:
    """Find out why no node of a cluster tells where the slots are: the client wraps what went wrong."""
    cause = error.__cause__
    if isinstance(cause, RedisClusterException):  # an answer that is an error is wrapped twice
        cause = cause.__context__
        if "cluster support disabled" in str(cause):
            return ConfigError(f"the server at {address(client)} is none of a cluster; leave redis.cluster out")
    ours = _as_ours(client, cause) if cause is not None else None
    return ours or _unavailable(client, cause or error)


def _unavailable(client: StreamConnection, error: BaseException) -> StreamUnavailableError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return StreamUnavailableError(
        f"the stream server at {address(client)} does not answer ({reason}); "
        "see that it runs and that redis.url names it"
    )
