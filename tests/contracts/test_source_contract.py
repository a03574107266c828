"""What every `Source` of images by reference does: keys of a real Valkey, objects on a real S3 server, a web server."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

import boto3
import pytest
from aiohttp import web
from helpers.fakes import png
from helpers.s3_server import point_to
from helpers.streams import single_client
from redis.asyncio import Redis

from schemas.errors import MessageError, Reason, StreamUnavailableError
from schemas.references import Reference, parse_reference
from schemas.settings import RedisSettings
from workers.references.http import HttpSource
from workers.references.key import KeySource
from workers.references.s3 import S3Source
from workers.references.source import RetryableError, Source

pytestmark = pytest.mark.anyio

MAX_BYTES = 1 << 12
PATIENCE_S = 30.0
CONCURRENCY = 4


class World(Protocol):
    """A place with images, a source that reads them, and one whose place does not answer."""

    source: Source
    cut_off: Source

    async def put(self, name: str, data: bytes) -> Reference:
        """Put something there; gives how it is referred to."""
        ...

    def nothing(self) -> Reference:
        """Refer to what is not there."""
        ...


class SourceContract:
    """The law."""

    async def test_an_image_is_read_as_it_is(self, world: World) -> None:
        assert await world.source.read(await world.put("a", png(7))) == png(7)

    async def test_what_was_replaced_is_read_anew(self, world: World) -> None:
        for grey in (7, 8):
            assert await world.source.read(await world.put("a", png(grey))) == png(grey)

    async def test_as_large_as_allowed_is_read_and_one_byte_more_is_too_large(self, world: World) -> None:
        assert await world.source.read(await world.put("fits", bytes(MAX_BYTES))) == bytes(MAX_BYTES)
        reference = await world.put("large", bytes(MAX_BYTES + 1))
        with pytest.raises(MessageError) as caught:
            await world.source.read(reference)
        assert caught.value.reason is Reason.TOO_LARGE
        assert str(reference) in str(caught.value)

    @pytest.mark.parametrize("absent", [True, False], ids=["absent", "empty"])
    async def test_what_is_no_image_is_unavailable(self, world: World, *, absent: bool) -> None:
        reference = world.nothing() if absent else await world.put("empty", b"")
        with pytest.raises(MessageError) as caught:
            await world.source.read(reference)
        assert caught.value.reason is Reason.UNAVAILABLE_REFERENCE
        assert str(reference) in str(caught.value)

    async def test_reads_at_once_get_each_its_own(self, world: World) -> None:
        images = [png(grey) for grey in range(3 * CONCURRENCY)]
        references = [await world.put(f"at-once-{grey}", image) for grey, image in enumerate(images)]
        assert await asyncio.gather(*map(world.source.read, references)) == images

    async def test_a_refusal_harms_no_later_read(self, world: World) -> None:
        for reference in (world.nothing(), await world.put("large", bytes(MAX_BYTES + 1))):
            with pytest.raises(MessageError):
                await world.source.read(reference)
        assert await world.source.read(await world.put("a", png(7))) == png(7)

    async def test_a_place_that_does_not_answer_says_nothing_of_the_reference(self, world: World) -> None:
        with pytest.raises((RetryableError, StreamUnavailableError)):
            await world.cut_off.read(world.nothing())

    async def test_it_may_be_closed_unused_and_twice(self, world: World) -> None:
        await world.cut_off.close()
        await world.source.read(await world.put("a", png(7)))
        for _ in range(2):
            await world.source.close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Give a port that nobody listens on, for as long as the test lasts."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield int(closed.getsockname()[1])


class KeyWorld:
    def __init__(self, client: Redis, nobody: Redis) -> None:
        self._client = client
        self.source: Source = KeySource(client, MAX_BYTES)
        self.cut_off: Source = KeySource(nobody, MAX_BYTES)

    async def put(self, name: str, data: bytes) -> Reference:
        await self._client.set(f"frames:{name}", data)
        return parse_reference(f"key:frames:{name}")

    def nothing(self) -> Reference:
        return parse_reference("key:frames:absent")


class TestKeySource(SourceContract):
    @pytest.fixture
    async def world(self, redis_settings: RedisSettings, closed_port: int) -> AsyncIterator[World]:
        nowhere = redis_settings.model_copy(update={"url": f"redis://127.0.0.1:{closed_port}/0"})
        async with single_client(redis_settings) as client, single_client(nowhere) as nobody:
            yield KeyWorld(client, nobody)


class HttpWorld:
    def __init__(self, port: int, closed_port: int, kept: dict[str, bytes]) -> None:
        self._port = port
        self._kept = kept
        self.source: Source = HttpSource(MAX_BYTES, PATIENCE_S, CONCURRENCY)
        self.cut_off: Source = _Elsewhere(HttpSource(MAX_BYTES, PATIENCE_S, CONCURRENCY), closed_port)

    async def put(self, name: str, data: bytes) -> Reference:
        self._kept[f"/{name}"] = data
        return self._refer(name)

    def nothing(self) -> Reference:
        return self._refer("absent")

    def _refer(self, name: str) -> Reference:
        return parse_reference(f"http://127.0.0.1:{self._port}/{name}")


class _Elsewhere:
    """A `Source` that is asked for the same at a port where nobody listens."""

    def __init__(self, source: Source, port: int) -> None:
        self._source = source
        self._port = port

    async def read(self, reference: Reference) -> bytes:
        return await self._source.read(parse_reference(f"http://127.0.0.1:{self._port}{reference.path}"))

    async def close(self) -> None:
        await self._source.close()


class TestHttpSource(SourceContract):
    @pytest.fixture
    async def world(self, closed_port: int) -> AsyncIterator[World]:
        kept: dict[str, bytes] = {}

        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=kept[request.path]) if request.path in kept else web.Response(status=404)

        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        world = HttpWorld(int(runner.addresses[0][1]), closed_port, kept)
        yield world
        await world.source.close()
        await world.cut_off.close()
        await runner.cleanup()


class S3World:
    def __init__(self, closed_port: int) -> None:
        self._store = boto3.client("s3")
        self._store.create_bucket(Bucket="photos")
        self.source: Source = S3Source(MAX_BYTES, PATIENCE_S, CONCURRENCY)
        self.cut_off: Source = _CutOffS3(closed_port)

    async def put(self, name: str, data: bytes) -> Reference:
        await asyncio.to_thread(self._store.put_object, Bucket="photos", Key=f"line/{name}", Body=data)
        return parse_reference(f"s3://photos/line/{name}")

    def nothing(self) -> Reference:
        return parse_reference("s3://photos/line/absent")

    async def close(self) -> None:
        await self.source.close()
        await self.cut_off.close()
        for found in self._store.list_objects_v2(Bucket="photos").get("Contents", ()):
            self._store.delete_object(Bucket="photos", Key=found["Key"])
        self._store.delete_bucket(Bucket="photos")
        self._store.close()


class _CutOffS3(S3Source):
    """Looks for its store at a port where nobody listens."""

    def __init__(self, port: int) -> None:
        super().__init__(MAX_BYTES, PATIENCE_S, CONCURRENCY)
        self._address = f"http://127.0.0.1:{port}"

    async def read(self, reference: Reference) -> bytes:
        with pytest.MonkeyPatch.context() as patch:
            point_to(patch, self._address)
            return await super().read(reference)


class TestS3Source(SourceContract):
    @pytest.fixture
    async def world(self, s3_server: str, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
        point_to(monkeypatch, s3_server)
        world = S3World(closed_port)
        yield world
        await world.close()
