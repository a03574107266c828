"""The streams as metrics, measured at intervals by every worker and by the API, which all report the same values."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import Metrics
from schemas.errors import FlawstreamError
from workers.observe.backlog import Backlog

_log = logging.getLogger(__name__)


class StreamGauges:
    """Sets the gauges of the streams.

    The counter of stream events starts at the server's own counts, which are older than this process, and never goes
    back, even where the server was emptied.

    Args:
        backlog: Measures the streams.
        metrics: Receives the values.
    """

    def __init__(self, backlog: Backlog, metrics: Metrics) -> None:
        self._backlog = backlog
        self._metrics = metrics
        self._counted: dict[str, int] = {}

    async def report(self) -> None:
        """Measure once. A server that does not answer is a metric too, and not logged here."""
        try:
            state = await self._backlog.read()
        except FlawstreamError:
            self._metrics.set(m.STREAM_UP, 0)
            return
        self._metrics.set(m.STREAM_UP, 1)
        self._metrics.set(m.BACKLOG_IMAGES, state.images)
        self._metrics.set(m.PENDING_IMAGES, state.pending)
        if state.lag is not None:
            self._metrics.set(m.LAG_IMAGES, state.lag)
        if state.orphans is not None:
            self._metrics.set(m.ORPHANED_IMAGES, state.orphans)
        self._metrics.set(m.OLDEST_IMAGE_SECONDS, state.oldest_s or 0.0)
        self._metrics.set(m.STREAM_RESULTS, state.results)
        self._metrics.set(m.STREAM_DEAD_LETTERS, state.dead)
        for event, count in state.counters.items():
            before = self._counted.get(event, 0)
            self._metrics.add(m.STREAM_EVENTS, count - before if count >= before else count, event=event)
        self._counted = dict(state.counters)


async def report_for_ever(every_s: float, reports: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Make the reports at intervals until cancelled; one that fails is logged as a bug and does not stop the others."""
    while True:
        for report in reports:
            try:
                await report()
            except Exception:  # noqa: BLE001 - the loop's outermost boundary
                _log.exception("metrics could not be reported; this is a bug")
        await asyncio.sleep(every_s)
