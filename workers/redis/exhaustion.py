"""Finds streams that take no more entries, as some client wrote the largest entry id there is."""

from collections.abc import Sequence

from redis.exceptions import NoPermissionError, ResponseError

from schemas.errors import ConfigError
from schemas.keys import StreamKeys
from workers.redis.connection import StreamConnection, address
from workers.redis.error_texts import is_missing_key
from workers.redis.errors import stream_errors

_LARGEST_ID = b"18446744073709551615-18446744073709551615"
_DELETE_IF_EMPTY = "if redis.call('XLEN',KEYS[1])==0 then return redis.call('DEL',KEYS[1]) end return 'not empty yet'"


async def require_not_exhausted(client: StreamConnection, shards: Sequence[StreamKeys]) -> None:
    """Check that entries can be added to every stream; one that this user may not look at is left out.

    Raises:
        ConfigError: A stream is exhausted; the text has the command that mends it.
        StreamUnavailableError: The server does not answer.
    """
    for keys in shards:
        if await _is_exhausted(client, keys.images):
            raise ConfigError(
                f"{keys.images} at {address(client)} takes no more images, as a client wrote the largest entry id; let "
                "the workers complete what is on it, then delete the empty stream, which they create again: "
                f'redis-cli EVAL "{_DELETE_IF_EMPTY}" 1 {keys.images}'
            )
        for stream in (keys.results, keys.dead):
            if await _is_exhausted(client, stream):
                raise ConfigError(
                    f"{stream} at {address(client)} takes no more entries, as a client wrote the largest entry id; "
                    f"rename it, and read the rest from there: redis-cli RENAME {stream} {stream}:full"
                )


async def _is_exhausted(client: StreamConnection, stream: str) -> bool:
    with stream_errors(client):
        try:
            info = await client.xinfo_stream(stream)
        except NoPermissionError:
            return False
        except ResponseError as error:
            if is_missing_key(error):
                return False
            raise
    return bool(info["last-generated-id"] == _LARGEST_ID)
