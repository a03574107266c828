"""Deferrals: images whose category has no usable version now stay pending and are tried again later."""

import logging
from datetime import datetime

from schemas.errors import ModelUnavailableError
from workers.observe import log_fields
from workers.ports import Clock, Deferral, Entry

_log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0
"""A deferred category is tried again so much later; until then its images are deferred without being decoded."""


class DeferredCategories:
    """Remembers which categories could not be judged, and since when.

    Args:
        clock: For the times.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._deferred_at: dict[bytes, datetime] = {}

    def has(self, entry: Entry) -> bool:
        """Return whether an image of the entry's category was deferred a moment ago."""
        at = self._deferred_at.get(entry.fields.get(b"category", b""))
        return at is not None and abs((self._clock.now() - at).total_seconds()) < _RETRY_AFTER_S

    def add(self, entry: Entry, deferral: Deferral) -> None:
        """Defer the entry's category for a moment; logged once, until one of its images can be judged."""
        category = entry.fields[b"category"]
        if category not in self._deferred_at:
            _log.warning(
                "%s: %s; its images stay pending and are tried again",
                ModelUnavailableError.code,
                deferral.detail,
                extra=log_fields.entries([entry]),
            )
        self._deferred_at[category] = self._clock.now()

    def remove(self, entry: Entry) -> None:
        """Note that an image of the entry's category was judged."""
        self._deferred_at.pop(entry.fields[b"category"], None)
