"""A worker process of a sharded stream with a fake detector, to be killed, paused and stopped.

Run it with `python -m helpers.shard_worker SETTINGS NAME`, the settings as JSON. It prints a line when it starts.
"""

import asyncio
import signal
import sys

from helpers.fakes import FakeDetector
from schemas.settings import Settings
from workers.consume.sharded import ShardedWorker
from workers.redis.connection import make_client


async def _main(settings: Settings, name: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with make_client(settings.redis) as client:
        worker = ShardedWorker(client, name, FakeDetector(), settings)
        sys.stdout.write("starts\n")
        sys.stdout.flush()
        await worker.run(stop)
        await worker.close()


if __name__ == "__main__":
    asyncio.run(_main(Settings.model_validate_json(sys.argv[1]), sys.argv[2]))
