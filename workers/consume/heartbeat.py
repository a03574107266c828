"""The heartbeat: while a worker has entries in flight, no other worker claims them."""

from collections.abc import Set as AbstractSet

from workers.consume.retry import Retry
from workers.ports import Clock, StreamReader

_HEARTBEATS_PER_CLAIM = 3
"""So many within the time after which an entry may be claimed: one heartbeat that fails loses none."""


class Heartbeat:
    """Renews the idle time of the entries in flight.

    Args:
        reader: Sends the heartbeat, for the entries that are still this consumer's.
        in_flight: Ids of the entries in flight; read at each heartbeat.
        clock: For the waits.
        retry: Logs heartbeats that fail.
        claim_idle_s: Time without a heartbeat after which an entry may be claimed.
    """

    def __init__(
        self, reader: StreamReader, in_flight: AbstractSet[str], clock: Clock, retry: Retry, claim_idle_s: float
    ) -> None:
        self._reader = reader
        self._in_flight = in_flight
        self._clock = clock
        self._retry = retry
        self._interval_s = claim_idle_s / _HEARTBEATS_PER_CLAIM

    async def run(self) -> None:
        """Beat until cancelled: batches that are finished after the stop need heartbeats too."""
        while True:
            await self._clock.sleep(self._interval_s)
            try:
                await self._reader.heartbeat(frozenset(self._in_flight))
            except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
                self._retry.log_failure("sending a heartbeat", error)
