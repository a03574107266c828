"""Names of the streams and of the consumer group, derived from one prefix. Source: docs/reference/streams.md."""

from zlib import crc32

from pydantic import BaseModel, ConfigDict

from schemas.settings import RedisSettings


class StreamKeys(BaseModel):
    """The three streams of one shard, and the group that its workers form.

    The keys of a shard have the hash tag `{<shard>}`, so that a cluster keeps them on one server and one script can
    end an image.

    Attributes:
        prefix: What every key starts with.
        shard: The shard's number; absent: the streams are not sharded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: str = "flawstream"
    shard: int | None = None

    @property
    def images(self) -> str:
        """Name the stream that producers write and workers read."""
        return f"{self._base}:images"

    @property
    def results(self) -> str:
        """Name the stream that workers write and consumers read."""
        return f"{self._base}:results"

    @property
    def dead(self) -> str:
        """Name the stream of the refused."""
        return f"{self._base}:dead"

    @property
    def counters(self) -> str:
        """Name the hash that counts what was refused, recognised as a duplicate, or trimmed."""
        return f"{self._base}:counters"

    @property
    def image_bytes(self) -> str:
        """Name the key that remembers for a moment how many bytes the images take."""
        return f"{self.images}:bytes"

    @property
    def group(self) -> str:
        """Name the consumer group of the workers on the images stream."""
        return "workers"

    def seen(self, message_id: str) -> str:
        """Name the key that remembers a pushed id for a while."""
        return f"{self._base}:seen:{message_id}"

    @property
    def _base(self) -> str:
        return self.prefix if self.shard is None else f"{self.prefix}:{{{self.shard}}}"


def all_keys(redis: RedisSettings) -> tuple[StreamKeys, ...]:
    """Give the keys of every shard, in order; of the one set of streams where they are not sharded."""
    if not redis.shards:
        return (StreamKeys(prefix=redis.prefix),)
    return tuple(StreamKeys(prefix=redis.prefix, shard=shard) for shard in range(redis.shards))


def keys_of(redis: RedisSettings, message_id: str) -> StreamKeys:
    """Give the keys of the shard that an image goes to: always the same one for an id, so that duplicates meet."""
    shards = all_keys(redis)
    return shards[crc32(message_id.encode()) % len(shards)]
