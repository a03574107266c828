"""How the streams stand: what waits, what is in hand, what was refused. Never an image's bytes."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.keys import StreamKeys
from workers.redis.connection import StreamConnection
from workers.redis.errors import stream_errors
from workers.redis.scripts import Script


@dataclass(frozen=True, slots=True)
class BacklogState:
    """How the streams stand, all shards together.

    Attributes:
        images: Entries on the images streams: those that wait, and those that workers have in hand.
        pending: Of these, how many were given to a worker.
        lag: How many were not yet given out. None where a server cannot tell, as after the delete of such an entry.
        oldest_s: How long the oldest of them has been there, by the server's clock; None where there is none.
        results: Results on their streams.
        dead: Dead letters on theirs.
        counters: What was refused, recognised as a duplicate or trimmed since the servers' data began, by name.
    """

    images: int
    pending: int
    lag: int | None
    oldest_s: float | None
    results: int
    dead: int
    counters: Mapping[str, int]


class Backlog:
    """Reads how the streams stand, however often it is asked, at most once in a while.

    Args:
        client: Of the server that has the streams.
        keys: Of every shard.
        max_age_s: An answer no older than this is given again; so is a failure, so that a server that is away does
            not keep everybody waiting one after the other.
    """

    def __init__(self, client: StreamConnection, keys: Sequence[StreamKeys], *, max_age_s: float = 1.0) -> None:
        self._client = client
        self._keys = keys
        self._max_age_s = max_age_s
        self._script = Script(client, "measure_backlog.lua")
        self._reading: asyncio.Task[BacklogState] | None = None
        self._read_at_s = 0.0

    async def read(self) -> BacklogState:
        """Tell how the streams stand.

        Raises:
            StreamUnavailableError: A server does not answer.
            ConfigError: A server refuses the user.
        """
        now_s = asyncio.get_running_loop().time()
        if self._reading is None or (self._reading.done() and now_s - self._read_at_s >= self._max_age_s):
            self._reading = asyncio.create_task(self._read_all())
        return await asyncio.shield(self._reading)  # a caller that gives up does not take the others along

    async def _read_all(self) -> BacklogState:
        try:
            with stream_errors(self._client):
                shards = await asyncio.gather(*(self._read_shard(keys) for keys in self._keys))
        finally:
            self._read_at_s = asyncio.get_running_loop().time()
        return _together(shards)

    async def _read_shard(self, keys: StreamKeys) -> BacklogState:
        reply: list[Any] = await self._script(
            keys=[keys.images, keys.results, keys.dead, keys.counters], args=[keys.group]
        )
        images, pending, lag, age_ms, results, dead, counted = reply
        names, values = counted[::2], counted[1::2]
        return BacklogState(
            images=images,
            pending=pending,
            lag=lag,
            oldest_s=None if age_ms < 0 else age_ms / 1000,
            results=results,
            dead=dead,
            counters={name.decode(): int(value) for name, value in zip(names, values, strict=True)},
        )


def _together(shards: Sequence[BacklogState]) -> BacklogState:
    lags = [shard.lag for shard in shards]
    counters: Counter[str] = Counter()
    for shard in shards:
        counters.update(shard.counters)
    return BacklogState(
        images=sum(shard.images for shard in shards),
        pending=sum(shard.pending for shard in shards),
        lag=None if None in lags else sum(lag for lag in lags if lag is not None),
        oldest_s=max((shard.oldest_s for shard in shards if shard.oldest_s is not None), default=None),
        results=sum(shard.results for shard in shards),
        dead=sum(shard.dead for shard in shards),
        counters=dict(counters),
    )
