"""Waiting for what others do: every wait has a deadline of its own, and an error that says what it waited for."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

Found = TypeVar("Found")
What = str | Callable[[], object]
"""What is waited for, or a function that says what there is instead."""

PATIENCE_S = 120.0
"""More than anything takes on a busy machine, and less than pytest's own limit, which says nothing."""


class Deadline:
    """A time after which nobody waits any longer.

    Args:
        what: What is waited for.
        seconds: How long.
    """

    def __init__(self, what: What, seconds: float = PATIENCE_S) -> None:
        self._what = what
        self._seconds = seconds
        self._end_s = time.monotonic() + seconds

    def check(self) -> None:
        """Raise TimeoutError if it has passed."""
        if time.monotonic() > self._end_s:
            what = self._what if isinstance(self._what, str) else self._what()
            raise TimeoutError(f"not within {self._seconds:g} s: {what}")


def wait_until(
    find: Callable[[], Found | None],
    what: What,
    *,
    deadline_s: float = PATIENCE_S,
    every_s: float = 0.05,
    ignoring: tuple[type[Exception], ...] = (),
) -> Found:
    """Ask again and again, until something is found or so.

    Args:
        find: Gives what is found; whatever is false means that it is not there yet.
        what: What is waited for, or a function that says what there is instead.
        deadline_s: How long, in all.
        every_s: How long between two questions.
        ignoring: Exceptions of `find` that mean that it is not there yet.

    Returns:
        What was found.

    Raises:
        TimeoutError: It was not there in time.
    """
    deadline = Deadline(what, deadline_s)
    while True:
        with suppress(*ignoring):
            if found := find():
                return found
        deadline.check()
        time.sleep(every_s)


async def wait_until_async(
    is_so: Callable[[], object], what: What, *, deadline_s: float = PATIENCE_S, every_s: float = 0.05
) -> None:
    """Wait as `wait_until` does, in an event loop; `is_so` may be a coroutine function."""
    deadline = Deadline(what, deadline_s)
    while not await _settled(is_so()):
        deadline.check()
        await asyncio.sleep(every_s)


async def _settled(answer: object) -> object:
    return await answer if isinstance(answer, Awaitable) else answer
