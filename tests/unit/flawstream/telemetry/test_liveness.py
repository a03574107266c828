"""`/livez`: alive before the loop begins and while it beats, not alive once it is blocked, though a thread answers."""

import asyncio
import time
import urllib.error
import urllib.request

import pytest

from flawstream.telemetry.liveness import Liveness
from flawstream.telemetry.prometheus import serve_metrics
from schemas.settings import MetricsSettings


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url.replace("/metrics", "/livez")) as answer:  # noqa: S310 - the test's own server
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.anyio
async def test_blocked_event_loop_is_not_alive() -> None:
    liveness = Liveness(silent_s=0.2)
    with serve_metrics(MetricsSettings(port=0), liveness) as (_, url):
        assert url is not None
        assert await asyncio.to_thread(status, url) == 200
        beating = asyncio.create_task(liveness.beat_for_ever())
        await asyncio.sleep(0)
        assert status(url) == 200
        time.sleep(0.3)  # noqa: ASYNC251 - that is the fault
        assert status(url) == 503
        with urllib.request.urlopen(url) as answer:  # noqa: S310, ASYNC210 - the test's own server
            assert answer.status == 200
        beating.cancel()
