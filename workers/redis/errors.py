"""Translates redis-py's exceptions into ours: a transient one, or a refusal that only other settings can fix."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    ClusterError,
    NoPermissionError,
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

from schemas.errors import ConfigError, FlawstreamError, StreamUnavailableError, one_line
from workers.redis.connection import PasswordFileError, StreamConnection, address
from workers.redis.error_texts import (
    is_closed_at_once,
    is_closed_while_writing,
    is_exhausted_stream,
    is_no_cluster,
    is_transient_reply,
    is_unreachable_cluster,
)

_TRANSIENT = (
    RedisConnectionError,  # also: loading its data, no free connection, no primary known to any Sentinel
    RedisTimeoutError,
    ReadOnlyError,  # it was the primary until just now
    ClusterDownError,
    ClusterError,  # redirected from node to node until redis-py gave up
    SlotNotCoveredError,
    AskError,  # also: moved
    TryAgainError,
)


@contextmanager
def stream_errors(client: StreamConnection) -> Iterator[None]:
    """Turn redis-py's exceptions into ours.

    Raises:
        StreamUnavailableError: The server does not answer, or not now.
        ConfigError: The user, the password or a certificate is refused, or the user lacks a right.
    """
    try:
        yield
    except (RedisError, RedisClusterException) as error:
        ours = _translate(client, error)
        if ours is None:
            raise
        raise ours from error
    except (AttributeError, TypeError) as error:
        if not is_closed_while_writing(error):
            raise
        raise _unavailable(client, RedisConnectionError("the connection was closed while it was written to")) from error


def _translate(client: StreamConnection, error: BaseException) -> FlawstreamError | None:
    """Return our error for redis-py's; None where it is a bug of ours."""
    if isinstance(error, RedisClusterException) and is_unreachable_cluster(error):
        return _unreachable_cluster(client, error)
    return _refusal(client, error) or _transient(client, error)


def _refusal(client: StreamConnection, error: BaseException) -> ConfigError | None:
    """Return the error where the server, or our own end, refuses: the settings must change."""
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


def _transient(client: StreamConnection, error: BaseException) -> StreamUnavailableError | None:
    """Return the error where the server may well serve later."""
    if isinstance(error, OutOfMemoryError):
        return StreamUnavailableError(
            f"the server at {address(client)} is out of memory and takes no writes; "
            "let the workers drain it, or raise its maxmemory"
        )
    if isinstance(error, ResponseError) and is_exhausted_stream(error):
        return StreamUnavailableError(
            f"a stream of the server at {address(client)} takes no more entries, as some client wrote one with the "
            "largest id; nothing was written; `flawstream doctor` names the stream and the command that mends it"
        )
    if isinstance(error, _TRANSIENT) or (isinstance(error, ResponseError) and is_transient_reply(error)):
        return _unavailable(client, error)
    return None


def _refused_tls(cause: BaseException | None) -> str | None:
    """Return the reason where one end does not trust the other, or speaks no TLS."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return (cause.reason or str(cause)).replace("_", " ").lower()
    return None


def _unreachable_cluster(client: StreamConnection, error: RedisClusterException) -> FlawstreamError:
    """Return why no node could be asked for the cluster's slots: redis-py wraps the cause."""
    cause = error.__cause__
    if isinstance(cause, RedisClusterException):  # a reply that is an error is wrapped twice
        cause = cause.__context__
        if is_no_cluster(cause):
            return ConfigError(f"the server at {address(client)} is not part of a cluster; leave redis.cluster out")
    ours = _translate(client, cause) if cause is not None else None
    return ours or _unavailable(client, cause or error)


def _unavailable(client: StreamConnection, error: BaseException) -> StreamUnavailableError:
    reason = one_line(error, 200) or type(error).__name__
    cure = "see that it runs and that redis.url names it"
    if is_closed_at_once(error):  # asyncio may see the end of the connection before TLS says why
        cure += "; with TLS also that it accepts the certificate in redis.tls_cert_file"
    return StreamUnavailableError(f"the stream server at {address(client)} does not answer ({reason}); {cure}")
