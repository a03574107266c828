"""Names of the streams and of the consumer group, derived from one prefix. Source: docs/reference/streams.md."""

from zlib import crc32

from pydantic import BaseModel, ConfigDict

from schemas.settings import RedisSettings


class StreamKeys(BaseModel):
    """The key names of one shard, and the consumer group of its workers.

    The keys of a shard have the hash tag `{<shard>}`, so that a cluster keeps them on one server, where one script can
    complete an entry.

    Attributes:
        prefix: Prefix of every key.
        shard: The shard's number; absent: the streams are not sharded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: str = "flawstream"
    shard: int | None = None

    @property
    def images(self) -> str:
        """Return the name of the stream that producers write and workers read."""
        return f"{self._base}:images"

    @property
    def results(self) -> str:
        """Return the name of the stream of results."""
        return f"{self._base}:results"

    @property
    def dead(self) -> str:
        """Return the name of the stream of dead letters."""
        return f"{self._base}:dead"

    @property
    def counters(self) -> str:
        """Return the name of the hash that counts refusals, duplicates, trimmed results and other events."""
        return f"{self._base}:counters"

    @property
    def image_bytes(self) -> str:
        """Return the name of the key that caches how many bytes the images stream takes."""
        return f"{self.images}:bytes"

    @property
    def workers(self) -> str:
        """Return the name of the hash of the workers' heartbeats; that of shard 0 is used."""
        return f"{self._base}:workers"

    def lease(self, consumer: str) -> str:
        """Return the name of the key by which one live worker has a consumer name; that of shard 0 is used."""
        return f"{self._base}:lease:{consumer}"

    @property
    def group(self) -> str:
        """Return the name of the workers' consumer group on the images stream."""
        return "workers"

    def seen(self, message_id: str) -> str:
        """Return the name of the key that remembers a pushed id for a while."""
        return f"{self._base}:seen:{message_id}"

    @property
    def outcomes_since(self) -> str:
        """Return the name of the key that has since when workers remember outcomes: that of the empty id."""
        return self.seen("")

    @property
    def _base(self) -> str:
        return self.prefix if self.shard is None else f"{self.prefix}:{{{self.shard}}}"


def all_keys(redis: RedisSettings) -> tuple[StreamKeys, ...]:
    """Return the keys of every shard, in order; one element where the streams are not sharded."""
    if not redis.shards:
        return (StreamKeys(prefix=redis.prefix),)
    return tuple(StreamKeys(prefix=redis.prefix, shard=shard) for shard in range(redis.shards))


def keys_of(redis: RedisSettings, message_id: str) -> StreamKeys:
    """Return the keys of the shard of an image id: always the same one, so that duplicates are recognised."""
    shards = all_keys(redis)
    return shards[crc32(message_id.encode()) % len(shards)]
