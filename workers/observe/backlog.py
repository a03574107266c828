"""Measures the streams: backlog, pending entries, lag, refusals. Transfers no image."""

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
    """One measurement of the streams, summed over all shards.

    Attributes:
        images: The backlog: all entries on the images streams.
        pending: Of these, how many were delivered to a worker.
        lag: How many were not yet delivered. None where a server does not know, as after such an entry was deleted.
        oldest_s: Age of the oldest image by the server's clock; None where there is none.
        results: Results on the results streams.
        dead: Dead letters on the dead-letter streams.
        counters: Refusals, duplicates, trimmed results and other events since the servers' data began, by name.
        delivered: How many images were ever delivered, redeliveries not counted. None where a server does not know.
    """

    images: int
    pending: int
    lag: int | None
    oldest_s: float | None
    results: int
    dead: int
    counters: Mapping[str, int]
    delivered: int | None = None

    @property
    def waiting(self) -> int:
        """Return how many images were not yet delivered; unlike `lag` always known."""
        return max(0, self.images - self.pending)  # pending may be what somebody deleted

    @property
    def orphans(self) -> int | None:
        """Return how many images are neither pending nor undelivered; None where a server does not know."""
        return None if self.lag is None else max(0, self.waiting - self.lag)

    @property
    def arrived(self) -> int | None:
        """Return how many images have ever arrived; None where a server does not know."""
        return None if self.delivered is None else self.delivered + self.waiting

    @property
    def refused(self) -> int:
        """Return how many pushes were ever refused; a producer that retries is counted with every try."""
        return sum(count for name, count in self.counters.items() if name.startswith("refused"))


class Backlog:
    """Measures the streams, and shares each measurement among all callers for a while.

    Args:
        client: A client of the streams' server.
        keys: Those of every shard.
        max_age_s: Age up to which a measurement is returned again; a failure too, so that callers do not wait for
            a server that is away one after the other.
    """

    def __init__(self, client: StreamConnection, keys: Sequence[StreamKeys], *, max_age_s: float = 1.0) -> None:
        self._client = client
        self._keys = keys
        self._max_age_s = max_age_s
        self._script = Script(client, "measure_backlog.lua")
        self._reading: asyncio.Task[BacklogState] | None = None
        self._read_at_s = 0.0

    async def read(self) -> BacklogState:
        """Return the latest measurement, or make one.

        Raises:
            StreamUnavailableError: A server does not answer.
            ConfigError: A server refuses the user.
        """
        now_s = asyncio.get_running_loop().time()
        if self._reading is None or (self._reading.done() and now_s - self._read_at_s >= self._max_age_s):
            self._reading = asyncio.create_task(self._read_all())
        return await asyncio.shield(self._reading)  # a caller that is cancelled does not cancel it for the others

    async def _read_all(self) -> BacklogState:
        try:
            with stream_errors(self._client):
                shards = await asyncio.gather(*(self._read_shard(keys) for keys in self._keys))
        finally:
            self._read_at_s = asyncio.get_running_loop().time()
        return _sum(shards)

    async def _read_shard(self, keys: StreamKeys) -> BacklogState:
        reply: list[Any] = await self._script(
            keys=[keys.images, keys.results, keys.dead, keys.counters], args=[keys.group]
        )
        images, pending, lag, delivered, age_ms, results, dead, counted = reply
        names, values = counted[::2], counted[1::2]
        return BacklogState(
            images=images,
            pending=pending,
            lag=lag,
            delivered=delivered,
            oldest_s=None if age_ms < 0 else age_ms / 1000,
            results=results,
            dead=dead,
            counters={name.decode(): int(value) for name, value in zip(names, values, strict=True)},
        )


def _sum(shards: Sequence[BacklogState]) -> BacklogState:
    counters: Counter[str] = Counter()
    for shard in shards:
        counters.update(shard.counters)
    return BacklogState(
        images=sum(shard.images for shard in shards),
        pending=sum(shard.pending for shard in shards),
        lag=_total([shard.lag for shard in shards]),
        delivered=_total([shard.delivered for shard in shards]),
        oldest_s=max((shard.oldest_s for shard in shards if shard.oldest_s is not None), default=None),
        results=sum(shard.results for shard in shards),
        dead=sum(shard.dead for shard in shards),
        counters=dict(counters),
    )


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
