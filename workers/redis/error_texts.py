"""Errors that can be recognised only by their text: each is matched here and nowhere else, with a link to its source.

When a new redis-py or server breaks one of these, its test in tests/ fails against the real server.
"""

from traceback import walk_tb

from redis.exceptions import RedisClusterException, RedisError

_TRANSIENT_CODES = ("BUSY ", "LOADING ", "MASTERDOWN ", "MISCONF ", "NOREPLICAS ", "UNBLOCKED ", "UNKILLABLE ")
"""Error codes of a server that may well serve later: github.com/valkey-io/valkey/blob/8.1/src/server.c, `shared`."""

_NO_CLUSTER_NODE = (
    "Redis Cluster cannot be connected",
    "All slots are not covered",
    "startup_nodes could not agree",
)
"""redis-py of a cluster that it cannot use: github.com/redis/redis-py/blob/v8.1.0/redis/asyncio/cluster.py,
`NodesManager.initialize`."""


def is_missing_group(error: RedisError) -> bool:
    """Return whether the stream or its consumer group does not exist.

    Source: github.com/valkey-io/valkey/blob/8.1/src/t_stream.c, `-NOGROUP`.
    """
    return str(error).startswith("NOGROUP")


def is_existing_group(error: RedisError) -> bool:
    """Return whether the consumer group to be created exists already.

    Source: github.com/valkey-io/valkey/blob/8.1/src/t_stream.c, `-BUSYGROUP`.
    """
    return str(error).startswith("BUSYGROUP")


def is_missing_key(error: RedisError) -> bool:
    """Return whether a stream to be described by XINFO does not exist.

    Source: github.com/valkey-io/valkey/blob/8.1/src/server.c, `shared.nokeyerr`.
    """
    return "no such key" in str(error)


def is_exhausted_stream(error: RedisError) -> bool:
    """Return whether a stream takes no more entries, as it has one with the largest id.

    Source: github.com/valkey-io/valkey/blob/8.1/src/t_stream.c, `xaddCommand`.
    """
    return "exhausted the last possible ID" in str(error)


def is_transient_reply(error: RedisError) -> bool:
    """Return whether the server cannot serve now and may well do so later, by the code that its reply starts with."""
    return str(error).startswith(_TRANSIENT_CODES)


def is_unreachable_cluster(error: RedisClusterException) -> bool:
    """Return whether no node of the cluster could be asked for its slots; the cause has the reason."""
    return str(error).startswith(_NO_CLUSTER_NODE)


def is_no_cluster(error: BaseException | None) -> bool:
    """Return whether the server is not part of a cluster.

    Source: github.com/valkey-io/valkey/blob/8.1/src/cluster.c, "This instance has cluster support disabled".
    """
    return "cluster support disabled" in str(error)


def is_closed_while_writing(error: BaseException) -> bool:
    """Return whether redis-py wrote to a connection that another task, or the server, had just closed.

    It then uses a stream that is no longer there and raises none of its own errors
    (github.com/redis/redis-py/issues/4287).
    """
    return any(frame.f_code.co_name == "_send_packed_command" for frame, _ in walk_tb(error.__traceback__))


def is_closed_at_once(error: BaseException) -> bool:
    """Return whether the connection was lost before the first command was written.

    Source: github.com/python/cpython/blob/3.11/Lib/asyncio/streams.py, `FlowControlMixin._drain_helper`.
    """
    return "Connection lost" in str(error)
