"""Retries with a deadline, and the log of what fails: one way for all parts of the worker's loop."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from schemas.errors import TransientError
from workers.consume.decode import between_ms
from workers.observe import log_fields
from workers.observe.tally import Tally
from workers.ports import Clock, Entry
from workers.redis.backoff import backoff_s

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Retry:
    """Retries transient errors with growing, jittered waits.

    Args:
        clock: For waits and deadlines.
        tally: Counts retries and bugs.

    Attributes:
        stop: Set when the worker stops: waits end, and what is retried is tried one last time.
    """

    def __init__(self, clock: Clock, tally: Tally) -> None:
        self.stop = asyncio.Event()
        self._clock = clock
        self._tally = tally

    def is_stopping(self) -> bool:
        """Return whether the worker stops."""
        return self.stop.is_set()

    async def call(
        self,
        attempt: Callable[[], Awaitable[_T]],
        deadline_s: float = math.inf,
        errors: type[TransientError] = TransientError,
    ) -> _T:
        """Await `attempt()` until it succeeds.

        Args:
            attempt: Makes the awaitable, anew for each try.
            deadline_s: No further try starts once so much time has passed.
            errors: What is tried again; other errors are raised.

        Raises:
            TransientError: The last try failed too: the deadline has passed, or the worker stops.
        """
        failures = 0
        started_at = self._clock.now()
        while True:
            last = self.is_stopping() or between_ms(started_at, self._clock.now()) >= deadline_s * 1000
            try:
                return await attempt()
            except errors as error:
                if last:
                    raise
                failures += 1
                self._tally.retried(error.code)
                delay_s = backoff_s(failures)
                _log.warning("%s: %s; trying again in %.1f s", error.code, error, delay_s)
            await self.wait(delay_s)

    async def wait(self, duration_s: float) -> None:
        """Wait for a time, or until the worker stops."""
        waits = [asyncio.ensure_future(self._clock.sleep(duration_s)), asyncio.ensure_future(self.stop.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def log_failure(self, action: str, error: Exception, entries: Sequence[Entry] = ()) -> None:
        """Log an error: a transient one as a warning, any other as a bug, counted and with its traceback.

        Args:
            action: What failed, as "reading".
            error: The error.
            entries: What it concerns.
        """
        if isinstance(error, TransientError):
            _log.warning("%s: %s: %s", action, error.code, error, extra=log_fields.entries(entries))
        else:
            self._tally.failed()
            _log.error("%s failed unexpectedly", action, exc_info=error, extra=log_fields.entries(entries))
