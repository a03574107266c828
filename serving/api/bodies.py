"""Reads request bodies, with limits on the bytes of one, the bytes of all in memory, and the time. Knows no image."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from schemas.errors import MessageError, Reason
from serving.api.problems import RETRY, RequestRefusedError

_LARGEST_BODIES = 16
"""Default limit on all bodies in memory, in bodies of the largest size."""
_TIMEOUT_S = 30.0


class Bodies:
    """Reads request bodies within limits.

    Args:
        max_bytes: Limit of one body.
        max_bytes_at_once: Limit of all bodies that are being read or used; by default 16 times `max_bytes`.
        timeout_s: Longest time to receive a body.
    """

    def __init__(self, max_bytes: int, *, max_bytes_at_once: int | None = None, timeout_s: float = _TIMEOUT_S) -> None:
        self._max_bytes = max_bytes
        self._max_bytes_at_once = _LARGEST_BODIES * max_bytes if max_bytes_at_once is None else max_bytes_at_once
        self._timeout_s = timeout_s
        self._bytes_in_memory = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body, which counts as in memory until the context ends. The limits do not rely on Content-Length.

        Raises:
            MessageError: `too_large`; or `malformed`, as the body is empty.
            RequestRefusedError: 408, too slow. 503, too many bytes are in memory already.
        """
        data = bytearray()
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    async for chunk in request.stream():
                        self._bytes_in_memory += len(chunk)
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
            self._bytes_in_memory -= len(data)

    def _refuse_too_much(self, read_bytes: int) -> None:
        if read_bytes > self._max_bytes:
            raise MessageError(
                Reason.TOO_LARGE,
                f"the body has more than {self._max_bytes:,} bytes; "
                "send a smaller image or raise limits.max_image_bytes",
            )
        if self._bytes_in_memory > self._max_bytes_at_once:
            raise RequestRefusedError(503, "busy", "too many images are being received; retry later", RETRY)
