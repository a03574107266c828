"""A server with one user for each role of `flawstream acl`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from helpers.fakes import FakeDetector, png
from helpers.streams import add, single_client
from helpers.waiting import wait_until_async
from schemas.keys import StreamKeys, all_keys
from schemas.settings import RedisSettings, Settings
from workers.acl import Role
from workers.consume.sharded import ShardedWorker

PASSWORD = "correct horse battery staple"  # noqa: S105 - of a server that lives for this test


@dataclass
class Plant:
    """A server with one user for each role, and the streams as its administrator sees them."""

    admin: Redis
    base: RedisSettings

    @property
    def keys(self) -> StreamKeys:
        return all_keys(self.base)[-1]  # the last: its number has the most digits

    def as_(self, role: Role) -> RedisSettings:
        return self.base.model_validate(self.base.model_dump() | {"username": f"plant-{role}", "password": PASSWORD})

    @asynccontextmanager
    async def client(self, role: Role) -> AsyncIterator[Redis]:
        async with single_client(self.as_(role)) as client:
            yield client

    async def is_clean(self) -> bool:
        """Tell whether all images have ended and the one worker is the one consumer."""
        consumers = await self.admin.xinfo_consumers(self.keys.images, self.keys.group)
        return not await self.admin.xlen(self.keys.images) and [one["name"] for one in consumers] == [b"w"]

    @asynccontextmanager
    async def worker(self, role: Role = Role.WORKER, **settings: Any) -> AsyncIterator[ShardedWorker]:
        """Have a worker run as a user; it must do so without an unexpected failure."""
        async with self.client(role) as client:
            worker = ShardedWorker(client, "w", FakeDetector(), Settings(redis=self.as_(role), **settings))
            stop = asyncio.Event()
            running = asyncio.create_task(worker.run(stop))
            yield worker
            assert await self.admin.exists(all_keys(self.base)[0].lease("w"))
            stop.set()
            await running
            await worker.close()
            assert worker.stats.errors == 0

    async def add_image(self, image: bytes | None = None, message_id: str = "part-1") -> str:
        fields = {"id": message_id, "category": "bottle", "image": png() if image is None else image}
        return await add(self.admin, self.keys.images, fields)


async def until(happened: Callable[[], Awaitable[object]], worker: ShardedWorker) -> None:
    """Wait for the worker to do something; a failure that it cannot foresee ends the wait."""

    async def without_errors() -> object:
        assert worker.stats.errors == 0
        return await happened()

    await wait_until_async(without_errors, "what the worker is to do")


async def run_command(client: Redis, *command: str) -> None:
    """Run any command."""
    await client.execute_command(*command)  # type: ignore[no-untyped-call]


async def expect_refusal(client: Redis, *command: str) -> None:
    with pytest.raises(ResponseError) as caught:
        await run_command(client, *command)
    text = f"{type(caught.value).__name__} {caught.value}"
    assert "NoPermission" in text or "NOPERM" in text or "ACL failure" in text, f"{command}: {text}"
