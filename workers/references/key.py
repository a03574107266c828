"""Images under keys of the stream server itself: `key:frames:42` is the value of the key `frames:42`."""

from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from schemas.errors import ConfigError
from schemas.references import Reference
from workers.redis.connection import StreamConnection
from workers.redis.errors import stream_errors
from workers.references.source import too_large, unavailable


class KeySource:
    """A `Source` on the stream server.

    While the server does not answer, the image stays pending, as every other does.

    Args:
        client: A client of the server or cluster that has the streams.
        max_bytes: Largest image.
    """

    def __init__(self, client: StreamConnection, max_bytes: int) -> None:
        self._client = client
        self._max_bytes = max_bytes

    async def read(self, reference: Reference) -> bytes:
        """Read a value, after a check of its size; see `Source`."""
        try:
            with stream_errors(self._client):
                size_bytes = int(await self._client.strlen(reference.path))
                if size_bytes > self._max_bytes:
                    raise too_large(reference, size_bytes, self._max_bytes)
                data: Any = await self._client.get(reference.path) or b""
        except ResponseError as error:  # not translated by `stream_errors`: WRONGTYPE
            raise unavailable(reference, f"the server answers {str(error)[:100]}") from None
        except ConfigError as error:
            if isinstance(error.__cause__, NoPermissionError):
                raise unavailable(reference, "the worker's user may not read this key") from None
            raise
        if not data:
            raise unavailable(reference, "the key is absent, expired or empty")
        if len(data) > self._max_bytes:  # replaced in between
            raise too_large(reference, len(data), self._max_bytes)
        return bytes(data)

    async def close(self) -> None:
        """Do nothing: the caller closes the client."""
