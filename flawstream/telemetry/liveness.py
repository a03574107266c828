"""Whether an event loop still runs, as its own beats tell: a thread asks, so that a blocked loop is found out."""

import asyncio
import time

_BEAT_S = 1.0


class Liveness:
    """The beats of an event loop.

    Args:
        silent_s: After so long without a beat the process is not alive. Before the first beat it is: it starts.
    """

    def __init__(self, silent_s: float = 30.0) -> None:
        self._silent_s = silent_s
        self._beat_s = 0.0

    @property
    def alive(self) -> bool:
        """Whether the loop has not begun, or had a beat lately. Of any thread."""
        return not self._beat_s or time.monotonic() - self._beat_s < self._silent_s

    async def beat_for_ever(self) -> None:
        """Beat until cancelled."""
        while True:
            self._beat_s = time.monotonic()
            await asyncio.sleep(_BEAT_S)
