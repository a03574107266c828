"""Whether there is room for one more image: what scripts are told of the bounds, and how a refusal reads.

Knows no image: it is for whoever adds some, be it a producer or a replay of dead letters.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from redis.exceptions import OutOfMemoryError, RedisError

from schemas.errors import BacklogFullError
from schemas.keys import StreamKeys
from schemas.settings import BacklogSettings
from workers.redis.backoff import backoff_s
from workers.redis.connection import StreamConnection, address
from workers.redis.scripts import Script

_T = TypeVar("_T")

REMEMBER_S = 600
"""How long an id is known after its image was added: one pushed again within writes nothing."""


class Room:
    """The bounds of a backlog.

    A script that adds an image is put together of `_capacity.lua` and its own file. Its first keys are those of
    `keys`, its first arguments `bounds`, and its reply is for `entry_id`.

    Args:
        client: Of the server that has the stream.
        backlog: The bounds.
    """

    def __init__(self, client: StreamConnection, backlog: BacklogSettings) -> None:
        self.bounds = (backlog.max_images, backlog.max_bytes)
        self._client = client
        self._count = Script(client, "count_refusal.lua")

    @staticmethod
    def keys(keys: StreamKeys) -> list[str]:
        """Name what a script needs to know whether there is room."""
        return [keys.images, keys.counters, keys.image_bytes]

    def entry_id(self, keys: StreamKeys, reply: Sequence[Any]) -> str:
        """Read a script's reply.

        Raises:
            BacklogFullError: There was no room, and nothing was written.
        """
        self.refuse(keys, reply)
        return str(reply[0].decode())

    def refuse(self, keys: StreamKeys, reply: Sequence[Any]) -> None:
        """Raise where a script's reply says that there is no room.

        Raises:
            BacklogFullError: There was no room, and nothing was written.
        """
        if reply[0]:
            return
        _, bound, value = reply
        if bound == b"images":
            raise BacklogFullError(
                f"{value:,} images wait on {keys.images} and {self.bounds[0]:,} are allowed; "
                "nothing was written; wait, add workers, or raise backlog.max_images"
            )
        raise BacklogFullError(
            f"the images on {keys.images} take {value:,} bytes and {self.bounds[1]:,} are allowed; "
            "nothing was written; wait, add workers, or raise backlog.max_bytes"
        )

    @asynccontextmanager
    async def memory_errors(self, keys: StreamKeys) -> AsyncIterator[None]:
        """Turn a server's being out of memory, which it says before a script runs, into a refusal, and count it.

        Raises:
            BacklogFullError: The server is out of memory, and nothing was written.
        """
        try:
            yield
        except OutOfMemoryError as error:
            with contextlib.suppress(RedisError):  # counted or not, it is a refusal
                await self._count(keys=[keys.counters], args=["refused_memory"])
            raise BacklogFullError(
                f"the server at {address(self._client)} is out of memory and nothing was written; "
                "wait for the workers, or raise its maxmemory"
            ) from error


async def when_there_is_room(attempt: Callable[[], Awaitable[_T]], wait_s: float) -> _T:
    """Try to add an image, again and again until there is room.

    Args:
        attempt: Adds it, or raises BacklogFullError.
        wait_s: How long to try; with 0 once.

    Returns:
        What the attempt gives.

    Raises:
        BacklogFullError: There was no room in time.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + wait_s
    failures = 0
    while True:
        try:
            return await attempt()
        except BacklogFullError:
            failures += 1
            left_s = deadline - clock()
            if left_s <= 0:
                raise
            await asyncio.sleep(min(left_s, backoff_s(failures)))
