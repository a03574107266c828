"""Something that owns a connection to the stream server, and the check that the server is one we can use."""

from types import TracebackType
from typing import Self

from redis.exceptions import NoPermissionError

from schemas.errors import ConfigError
from schemas.settings import RedisSettings
from workers.redis.connection import StreamConnection, address, make_client
from workers.redis.errors import stream_errors

_OLDEST_SERVER = 7


async def require_server(client: StreamConnection) -> None:
    """Check that the server answers and can run our scripts.

    Raises:
        ConfigError: It is older than version 7, or refuses the user.
        StreamUnavailableError: It does not answer.
    """
    try:
        with stream_errors(client):
            info = await client.info("server")
    except ConfigError as error:
        if isinstance(error.__cause__, NoPermissionError):
            return  # this user may not run INFO; the first script shows whether the server is new enough
        raise
    version = str(info.get("redis_version", "0"))
    if int(version.split(".", maxsplit=1)[0]) < _OLDEST_SERVER:
        raise ConfigError(
            f"the server at {address(client)} is Redis {version} and flawstream needs {_OLDEST_SERVER} or later, "
            "or any Valkey; point redis.url at a newer one, or leave it out to run the embedded server"
        )


class StreamClient:
    """Owns a connection, opened and closed by `async with`.

    Args:
        settings: Where the server is.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._client = make_client(settings)

    async def open(self) -> None:
        """Check that the server answers and can run our scripts.

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
