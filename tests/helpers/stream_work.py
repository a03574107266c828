"""A producer that does not give up and a worker that runs meanwhile, for tests that take servers away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from helpers.fakes import png
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.waiting import PATIENCE_S
from schemas.errors import StreamUnavailableError
from workers.consume.sharded import ShardedWorker
from workers.consume.worker import StreamWorker
from workers.produce.producer import Producer
from workers.redis.backoff import backoff_s


async def push_surely(producer: Producer, message_id: str) -> str:
    """Push an image until the server has confirmed it."""
    async with asyncio.timeout(PATIENCE_S):
        failures = 0
        while True:
            try:
                return await producer.push(png(), "bottle", id=message_id)
            except StreamUnavailableError:
                failures += 1
                await asyncio.sleep(backoff_s(failures))


@asynccontextmanager
async def working(worker: ShardedWorker | StreamWorker) -> AsyncIterator[None]:
    """Have a worker work; it is closed at the end where it can be."""
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    try:
        yield
    finally:
        stop.set()
        await task
        if isinstance(worker, ShardedWorker):
            await worker.close()


def ended(server: Server, stream: str) -> list[str]:
    """List the ids of the outcomes on a stream, as the server has them."""
    with RawRedis(server.port) as raw:
        return [fields["id"].decode() for _, fields in raw.entries(stream)]
