"""How images ended, counted on the server itself over a plain socket: none of our readers has a say in it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from helpers.raw_redis import RawRedis

_PAGE = 500


@dataclass
class Endings:
    """What the results and the dead letters hold.

    Attributes:
        count: How often each image ended, by its id.
        ended_ms: When, by the server's clock.
        reasons: Why it is a dead letter, for those that are.
    """

    count: Counter[str] = field(default_factory=Counter)
    ended_ms: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def read_endings(redis: RawRedis, prefix: str = "flawstream") -> Endings:
    """Read all endings from the server."""
    found = Endings()
    for stream in ("results", "dead"):
        for entry_id, fields in _pages(redis, f"{prefix}:{stream}"):
            key = fields.get("id", fields.get("dead.entry_id", b"")).decode("utf-8", "replace")
            found.count[key] += 1
            found.ended_ms[key] = int(entry_id.partition("-")[0])
            if stream == "dead":
                found.reasons[key] = fields["dead.reason"].decode()
    return found


def _pages(redis: RawRedis, stream: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    start = "-"
    while True:
        page = redis.entries(stream, start, _PAGE)
        yield from page
        if len(page) < _PAGE:
            return
        start = f"({page[-1][0]}"
