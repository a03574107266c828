"""An event loop whose time jumps to the next timer: hours of waiting cost nothing, and a run is the same every time."""

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from typing import Any

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
"""The time of day when a simulation begins."""


class StandstillError(Exception):
    """Nothing is left that could ever happen, and somebody waits."""


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop on simulated time. What is given to an executor runs at once, in the loop's own thread.

    No socket is watched and no other thread may wake it, so that the order of all that happens depends on the
    program alone.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Return the seconds since the simulation began."""
        return self._now_s

    def jump(self, duration_s: float) -> None:
        """Move the time on."""
        self._now_s += duration_s

    def run_in_executor(  # type: ignore[override]  # asyncio's stub returns a Future of any type too
        self, executor: Executor | None, func: Callable[..., Any], *arguments: Any
    ) -> asyncio.Future[Any]:
        """Run a function here and now."""
        del executor
        future: asyncio.Future[Any] = self.create_future()
        try:
            future.set_result(func(*arguments))
        except Exception as error:  # noqa: BLE001 - whatever the function raises, its caller gets
            future.set_exception(error)
        return future


class _JumpingSelector(selectors.SelectSelector):
    """Waits by moving the loop's time on."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StandstillError("every task waits for another")
        self._loop.jump(max(0.0, timeout))
        return []


class SimulatedClock:
    """A `Clock` on simulated time, which may be set wrong.

    Args:
        loop: Has the time.

    Attributes:
        wrong_by: What somebody has set the clock forward, or back where negative.
    """

    def __init__(self, loop: SimulatedLoop) -> None:
        self.wrong_by = timedelta()
        self._loop = loop

    def now(self) -> datetime:
        """Return the time of day, as this clock shows it."""
        return BEGAN + timedelta(seconds=self._loop.time()) + self.wrong_by

    async def sleep(self, duration_s: float) -> None:
        """Wait."""
        await asyncio.sleep(duration_s)
