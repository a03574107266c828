"""What a generator returns at its end, where a test does not care for what it yields."""

from collections.abc import Generator
from typing import TypeVar

Returned = TypeVar("Returned")


def returned(steps: Generator[object, None, Returned]) -> Returned:
    """Run a generator to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Returned = end.value
            return result
