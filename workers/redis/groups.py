"""Consumer groups: created where they are missing, and read from."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.exceptions import ResponseError

from workers.redis.connection import StreamConnection
from workers.redis.error_texts import is_existing_group, is_missing_group

_T = TypeVar("_T")

Row = tuple[str, dict[bytes, bytes]]
"""An entry's id, and its fields; an entry that was deleted has none."""

_CREATE_GROUP = """#!lua flags=allow-oom
return redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
"""


def rows(reply: Any) -> list[Row]:
    """Return the entries of a reply, typed; redis-py's own types are a union over all options."""
    return [(entry_id.decode(), fields) for entry_id, fields in reply]


async def create_group(client: StreamConnection, stream: str, group: str) -> None:
    """Create a consumer group at the stream's start: one created at its end loses earlier entries.

    By a script with allow-oom: a server at its memory limit refuses the plain command, and could not be drained.
    """
    try:
        await client.eval(_CREATE_GROUP, 1, stream, group)
    except ResponseError as error:
        if not is_existing_group(error):  # another process was first
            raise


async def in_group(client: StreamConnection, stream: str, group: str, read: Callable[[], Awaitable[_T]]) -> _T:
    """Await `read()`, which reads as a consumer of a group; where the group is missing, create it and read again."""
    try:
        return await read()
    except ResponseError as error:
        if not is_missing_group(error):
            raise
    await create_group(client, stream, group)
    return await read()


async def read_group(
    client: StreamConnection,
    stream: str,
    group: str,
    consumer: str,
    *,
    cursor: str,
    max_entries: int,
    block_ms: int | None,
) -> list[Row]:
    """Read entries as a consumer of a group (XREADGROUP), which is created where it is missing.

    Args:
        client: A client of the stream's server.
        stream: The stream's name.
        group: The group's name.
        consumer: The consumer's name in the group.
        cursor: `>` for new entries, or the id after which to read the consumer's own pending entries.
        max_entries: At most so many.
        block_ms: How long to wait at the server for a new entry; None does not wait.
    """

    async def read() -> list[Row]:
        reply: Any = await client.xreadgroup(group, consumer, {stream: cursor}, count=max_entries, block=block_ms)
        return rows(reply.get(stream.encode(), ()))

    return await in_group(client, stream, group, read)
