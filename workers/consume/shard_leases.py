"""Which shards a worker reads: the policy alone, without I/O and without a clock.

Every worker increments a counter of its own, in one hash on the stream server, with every heartbeat, and the reply is
everybody's counters. A worker whose counter stood still for `MISSED_HEARTBEATS` of one's own heartbeats in a row is
dead; one that has left deletes its counter. No clock is compared with another, so that a clock that is set, on a worker
or on the server, changes nothing.

From the names of the live workers each computes the same shares. They decide who reads, and nothing else: for a moment
two workers may read one shard, as they always may, and each image still completes once.
"""

from collections.abc import Collection, Mapping

HEARTBEAT_S = 0.75
"""Time between two heartbeats of a worker."""
MISSED_HEARTBEATS = 4
"""A worker is dead after so many: within 3.75 s, `HEARTBEAT_S` times one more."""
_SILENT_HEARTBEATS = 2
"""A worker may be dead after so many."""


class ShardLeases:
    """What one worker knows of the others, and the shards that it reads.

    Args:
        worker: This worker's name. Two workers of one name are one worker here: both read the same shards.
        shards: How many there are.
    """

    def __init__(self, worker: str, shards: int) -> None:
        self._worker = worker
        self._shards = shards
        self._missed: dict[str, int] = {}
        self._counters: dict[str, int] = {}
        self._failures = MISSED_HEARTBEATS  # nothing is known yet

    def heard(self, counters: Mapping[str, int]) -> None:
        """Take in the reply to a heartbeat: everybody's counters."""
        self._missed = {
            name: self._missed[name] + 1 if self._counters.get(name) == count else 0 for name, count in counters.items()
        }
        self._counters = dict(counters)
        self._failures = 0

    def not_heard(self) -> None:
        """Take in that a heartbeat failed. Where several fail in a row, the worker reads all shards."""
        self._failures += 1

    @property
    def workers(self) -> list[str]:
        """The live workers by name, this one included."""
        live = {name for name, missed in self._missed.items() if missed < MISSED_HEARTBEATS}
        return sorted(live | {self._worker})

    @property
    def dead(self) -> dict[str, int]:
        """The dead workers' counters, to be deleted unless they have moved."""
        return {
            name: self._counters[name]
            for name, missed in self._missed.items()
            if missed >= MISSED_HEARTBEATS and name != self._worker
        }

    @property
    def shares(self) -> dict[int, float]:
        """The shards that this worker reads, with its share of each; all where the others are not known."""
        if self._failures >= MISSED_HEARTBEATS:
            return dict.fromkeys(range(self._shards), 1.0)
        return shares(self.workers, self._worker, self._shards)

    @property
    def unread(self) -> set[int]:
        """The shards whose every reader has missed its last heartbeats: they may be without a reader for a moment."""
        if self._failures >= MISSED_HEARTBEATS:
            return set()
        workers = self.workers
        read: set[int] = set()
        for name in workers:
            if name == self._worker or self._missed[name] < _SILENT_HEARTBEATS:
                read |= shares(workers, name, self._shards).keys()
        return set(range(self._shards)) - read


def shares(workers: Collection[str], worker: str, shards: int) -> dict[int, float]:
    """Return the shards that one of several workers reads, with its share of each.

    The shards lie on a line that is cut into one piece of equal length for each worker, in the order of their names. A
    worker reads the shards that its piece touches, so all have equally much to do: of four shards, three workers read
    one whole shard and a third of the last each. Every shard has a reader and every worker a shard, whichever are
    more. Where a worker comes or goes, the cuts move; a shard that changes hands costs a read, as it has no state in a
    worker. (Rendezvous hashing moves fewer shards, and gives one worker twice the work of another, or none.)

    Args:
        workers: Names, this worker's included.
        worker: The worker's name.
        shards: How many there are.

    Returns:
        For each shard that it reads the share, above 0 and at most 1; ascending. The shares of a shard sum to 1.
    """
    # in units of 1 / len(workers) of a shard, so that every number is an integer
    start = sorted(workers).index(worker) * shards
    end = start + shards
    return {
        shard: (min(end, (shard + 1) * len(workers)) - max(start, shard * len(workers))) / len(workers)
        for shard in range(start // len(workers), -(-end // len(workers)))
    }


def divide(in_flight: int, shares_of: Mapping[int, float]) -> dict[int, int]:
    """Divide the batches that a worker may have in flight among its shards, by share; at least one each.

    Args:
        in_flight: How many in all; exceeded where there are more shards.
        shares_of: The shards and their shares, from `shares`.
    """
    slots = dict.fromkeys(shares_of, 1)
    for _ in range(in_flight - len(slots)):
        fullest = max(slots, key=lambda shard: (shares_of[shard] / slots[shard], -shard))
        slots[fullest] += 1
    return slots
