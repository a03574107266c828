"""Memory of the images that are being decoded in a process: those past a bound wait for the others.

Compressed bytes bound nothing: six PNGs of 182 KB need 2 GB at once.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class DecodingMemory:
    """Grants memory in the order in which it is asked for, so that a large image is not passed by for ever."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._used_bytes = 0
        self._waiting: deque[object] = deque()

    @contextmanager
    def take(self, wanted_bytes: int, limit_bytes: int) -> Iterator[None]:
        """Wait for memory, which is given back when the context ends. One image alone may have more than the limit.

        Each image takes seconds at most, so that a wait is as long as the queue.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(
                lambda: (
                    self._waiting[0] is ticket
                    and (not self._used_bytes or self._used_bytes + wanted_bytes <= limit_bytes)
                )
            )
            self._waiting.popleft()
            self._used_bytes += wanted_bytes
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= wanted_bytes
                self._changed.notify_all()
