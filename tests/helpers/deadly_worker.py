"""A worker process that an image of one grey level kills, as a bug in a decoder would.

Run it with `python -m helpers.deadly_worker URL`.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from flawstream.imaging.pixels import Depths, Pixels
from helpers.fakes import FakeDetector
from schemas.settings import Settings
from workers.consume.sharded import ShardedWorker
from workers.ports import Judgement
from workers.redis.connection import make_client

DEADLY = 66
MAX_DELIVERIES = 2


class DeadlyDetector(FakeDetector):
    """Takes its process along when it sees the image."""

    async def detect(
        self, images: Pixels, categories: Sequence[str], depths: Depths | None = None
    ) -> Sequence[Judgement]:
        if any(int(image.mean()) == DEADLY for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().detect(images, categories, depths)


async def _main(url: str) -> None:
    settings = Settings.model_validate(
        {"redis": {"url": url, "block_ms": 50}, "worker": {"max_deliveries": MAX_DELIVERIES}}
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with make_client(settings.redis) as client:
        worker = ShardedWorker(client, "station", DeadlyDetector(), settings)
        await worker.run(stop)
        await worker.close()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
