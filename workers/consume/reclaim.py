"""Reclaiming: entries whose worker died are claimed, one at a time, and completed here."""

import asyncio

from workers.consume.pipeline import Pipeline
from workers.consume.retry import Retry
from workers.observe.tally import Tally
from workers.ports import Retention, StreamReader


class Reclaimer:
    """Claims entries without a heartbeat, and orphans, removes stale consumers and trims the results.

    One entry at a time, in a batch of its own: an entry that kills workers takes no others with it.

    Args:
        reader: Claims entries.
        pipeline: Completes them.
        slots: One is taken for each batch in flight.
        retry: For waits, and for the log of what fails.
        tally: Counts orphans.
        sweep_s: Time between two sweeps.
        retention: Trims the results at every sweep; absent: they are not trimmed.
    """

    def __init__(
        self,
        reader: StreamReader,
        pipeline: Pipeline,
        slots: asyncio.Semaphore,
        retry: Retry,
        tally: Tally,
        *,
        sweep_s: float,
        retention: Retention | None,
    ) -> None:
        self._reader = reader
        self._pipeline = pipeline
        self._slots = slots
        self._retry = retry
        self._tally = tally
        self._sweep_s = sweep_s
        self._retention = retention

    async def run(self) -> None:
        """Sweep until the worker stops."""
        while not self._retry.is_stopping():
            try:
                await self.sweep()
            except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
                self._retry.log_failure("sweeping", error)
            await self._retry.wait(self._sweep_s)

    async def sweep(self) -> int:
        """Complete every entry that can be claimed, then remove stale consumers and trim the results.

        Returns:
            How many entries were completed.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        self._tally.orphaned(await self._reader.repair_pending())
        completed = 0
        deferred: set[str] = set()
        while not self._retry.is_stopping():
            async with self._slots:
                entries = [] if self._retry.is_stopping() else await self._reader.claim(1, self._pipeline.in_flight)
                completed += await self._pipeline.complete(entries)
            again = {entry.entry_id for entry in entries if self._pipeline.is_deferred(entry)}
            if not entries or again & deferred:  # one comes a second time: all have been tried
                break
            deferred |= again
        await self._reader.remove_stale_consumers()
        if self._retention is not None:
            await self._retention.trim()
        return completed
