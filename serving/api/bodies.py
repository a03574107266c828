"""Reads the bodies of requests within bounds: bytes of one, bytes of all at once, and time. Knows no image."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from schemas.errors import MessageError, Reason
from serving.api.problems import RETRY, RequestRefusedError

_AT_ONCE = 16
"""Bodies of the largest size that may be in memory together; of smaller ones accordingly more."""
_TIMEOUT_S = 30.0


class Bodies:
    """Gives out the bodies of requests.

    Args:
        max_bytes: Of one body.
        max_bytes_at_once: Of all that are being read or used; absent: 16 of the largest.
        timeout_s: Longest time in which a body must have come.
    """

    def __init__(self, max_bytes: int, *, max_bytes_at_once: int | None = None, timeout_s: float = _TIMEOUT_S) -> None:
        self._max_bytes = max_bytes
        self._max_bytes_at_once = _AT_ONCE * max_bytes if max_bytes_at_once is None else max_bytes_at_once
        self._timeout_s = timeout_s
        self._held_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body and stop at the limit, whatever Content-Length says; it counts until the context ends.

        Raises:
            MessageError: `too_large`, or `malformed`: there is none.
            RequestRefusedError: 408: it came too slowly. 503: too much is being read already.
        """
        data = bytearray()
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    async for chunk in request.stream():
                        self._held_bytes += len(chunk)
                        data += chunk
                        self._refuse_too_much(len(data))
            except TimeoutError:
                raise RequestRefusedError(
                    408, "too_slow", f"the body took longer than {self._timeout_s:g} s; send it faster"
                ) from None
            if not data:
                raise MessageError(
                    Reason.MALFORMED,
                    "the body is empty; send an image: "
                    "curl --data-binary @part.png '<address>/v1/detect?category=<category>'",
                )
            yield bytes(data)
        finally:
            self._held_bytes -= len(data)

    def _refuse_too_much(self, read_bytes: int) -> None:
        if read_bytes > self._max_bytes:
            raise MessageError(
                Reason.TOO_LARGE,
                f"the body has more than {self._max_bytes:,} bytes; "
                "send a smaller image or raise limits.max_image_bytes",
            )
        if self._held_bytes > self._max_bytes_at_once:
            raise RequestRefusedError(503, "busy", "too many images are being received at once; come back later", RETRY)
