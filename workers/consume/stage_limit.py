"""A limit for what may hang: decoding, a call of the detector, building results."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from schemas.errors import StageTimeoutError


@asynccontextmanager
async def stage_limit(limit_s: float) -> AsyncIterator[None]:
    """Limit what is awaited in the context.

    Raises:
        StageTimeoutError: It took longer; a thread that hangs goes on. A `TimeoutError` of its own is another matter.
    """
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise StageTimeoutError(
            f"a stage took longer than worker.stage_timeout_s ({limit_s:g} s); the process must end"
        ) from None
