"""Admission control: the bounds of the backlog, as arguments of scripts, and their refusals, as errors.

Used by all that adds images: the producer, and the replay of dead letters. Knows nothing of the images themselves.
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
"""How long an id is remembered: an image pushed again within that time is not written twice."""


class Admission:
    """Admission control of one backlog.

    A script that adds an image consists of `_capacity.lua` and its own file. Its first keys are `keys`, its first
    arguments `bounds`, and its reply is parsed by `entry_id`.

    Args:
        client: A client of the stream's server.
        backlog: The bounds.

    Attributes:
        bounds: Most images and most bytes.
    """

    def __init__(self, client: StreamConnection, backlog: BacklogSettings) -> None:
        self.bounds = (backlog.max_images, backlog.max_bytes)
        self._client = client
        self._count_script = Script(client, "count_refusal.lua")

    @staticmethod
    def keys(keys: StreamKeys) -> list[str]:
        """Return the names of the keys by which a script checks the capacity."""
        return [keys.images, keys.counters, keys.image_bytes]

    def entry_id(self, keys: StreamKeys, reply: Sequence[Any]) -> str:
        """Return the id in a script's reply.

        Raises:
            BacklogFullError: The backlog is full, and nothing was written.
        """
        self.refuse(keys, reply)
        return str(reply[0].decode())

    def refuse(self, keys: StreamKeys, reply: Sequence[Any]) -> None:
        """Raise where a script's reply is a refusal.

        Raises:
            BacklogFullError: The backlog is full, and nothing was written.
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
        """Turn the error of a server that is out of memory, raised before a script runs, into a refusal, and count it.

        Raises:
            BacklogFullError: The server is out of memory, and nothing was written.
        """
        try:
            yield
        except OutOfMemoryError as error:
            with contextlib.suppress(RedisError):  # counting is best effort
                await self._count_script(keys=[keys.counters], args=["refused_memory"])
            raise BacklogFullError(
                f"the server at {address(self._client)} is out of memory and nothing was written; "
                "wait for the workers, or raise its maxmemory"
            ) from error


async def retry_until_admitted(attempt: Callable[[], Awaitable[_T]], wait_s: float) -> _T:
    """Retry adding an image until it is admitted.

    Args:
        attempt: Adds the image, or raises BacklogFullError.
        wait_s: Deadline of the retries; 0 tries once.

    Returns:
        The attempt's return value.

    Raises:
        BacklogFullError: The image was not admitted in time.
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
