"""The real clock. Everything that needs the time takes a `Clock`; tests give it one that they control."""

import asyncio
from datetime import UTC, datetime


class SystemClock:
    """A `Clock` that returns the machine's time."""

    def now(self) -> datetime:
        """Return the time of day in UTC."""
        return datetime.now(UTC)

    async def sleep(self, duration_s: float) -> None:
        """Wait."""
        await asyncio.sleep(duration_s)
