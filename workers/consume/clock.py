"""The time of the machine. Everything that needs time is handed a `Clock`; this is the real one."""

import asyncio
from datetime import UTC, datetime


class SystemClock:
    """A `Clock` that tells the machine's time."""

    def now(self) -> datetime:
        """Tell the time of day in UTC."""
        return datetime.now(UTC)

    async def sleep(self, duration_s: float) -> None:
        """Let a time pass."""
        await asyncio.sleep(duration_s)
