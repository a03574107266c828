"""Images by reference from real servers on loopback: Valkey and HTTP. Nothing leads anywhere else."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from helpers.fakes import entry_id, png
from helpers.streams import single_client
from redis.asyncio import Redis

from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError, Reason, StreamUnavailableError
from schemas.settings import LimitSettings, RedisSettings, ReferenceSettings
from workers.consume.clock import SystemClock
from workers.consume.decode import DecodedEntry, Decoder
from workers.ports import Entry
from workers.redis.connection import make_client
from workers.references import ReferenceFetcher
from workers.references.http import HttpSource

pytestmark = pytest.mark.anyio

LIMITS = LimitSettings(max_image_bytes=1 << 16)
IMAGE = png()
SECRET = "X-Amz-Signature=0123456789"  # noqa: S105 - what must not be shown


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    async with single_client(redis_settings) as client:
        yield client


class Camera:
    """A web server on loopback, and what it was asked."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[web.Request] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.answers: dict[str, Callable[[web.Request], web.StreamResponse]] = {}

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def times(self, path: str) -> int:
        return sum(request.path == path for request in self.asked)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        await self.gate.wait()
        if request.path == "/images/endless":
            return await self._endless(request)
        found = self.answers.get(request.path)
        return found(request) if found else web.Response(status=404)

    @staticmethod
    async def _endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:  # until the other side has enough
            await response.write(b"x" * 4096)


@pytest.fixture
async def camera() -> AsyncIterator[Camera]:
    camera = Camera()
    camera.answers["/images/1"] = lambda _: web.Response(body=IMAGE)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", camera.answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    camera.port = int(runner.addresses[0][1])
    yield camera
    camera.gate.set()
    await runner.cleanup()


class Fetchers:
    """Makes fetchers and closes them."""

    def __init__(self, client: Redis, stack: AsyncExitStack) -> None:
        self._client = client
        self._stack = stack

    def __call__(self, *allow: str, timeout_s: float = 30.0, tries: int = 3, concurrency: int = 4) -> ReferenceFetcher:
        settings = ReferenceSettings(allow=allow, timeout_s=timeout_s, tries=tries, concurrency=concurrency)
        fetcher = ReferenceFetcher(settings, LIMITS, self._client, SystemClock())
        self._stack.push_async_callback(fetcher.close)
        return fetcher


@pytest.fixture
async def fetchers(client: Redis) -> AsyncIterator[Fetchers]:
    async with AsyncExitStack() as stack:
        yield Fetchers(client, stack)


async def fetch(fetcher: ReferenceFetcher, text: str) -> bytes:
    async with fetcher.fetch(text) as data:
        return data


async def refusal(fetcher: ReferenceFetcher, text: str) -> tuple[Reason, str]:
    with pytest.raises(MessageError) as caught:
        await fetch(fetcher, text)
    assert SECRET not in str(caught.value)
    return caught.value.reason, str(caught.value)


async def test_value_of_an_allowed_key_is_the_image(client: Redis, fetchers: Fetchers) -> None:
    await client.set("frames:1", IMAGE)
    await client.set("secrets:1", IMAGE)
    fetcher = fetchers("key:frames:")
    assert await fetch(fetcher, "key:frames:1") == IMAGE
    assert (await refusal(fetcher, "key:secrets:1"))[0] is Reason.FORBIDDEN_REFERENCE
    assert (await refusal(fetcher, "http://127.0.0.1/1"))[0] is Reason.FORBIDDEN_REFERENCE


async def test_key_that_is_absent_empty_or_no_string_is_unavailable(client: Redis, fetchers: Fetchers) -> None:
    await client.set("frames:empty", b"")
    await client.rpush("frames:list", b"x")
    fetcher = fetchers("key:frames:")
    for key in ("absent", "empty", "list"):
        assert (await refusal(fetcher, f"key:frames:{key}"))[0] is Reason.UNAVAILABLE_REFERENCE


async def test_value_that_is_too_large_is_not_transferred(client: Redis, fetchers: Fetchers) -> None:
    await client.set("frames:1", b"x" * (LIMITS.max_image_bytes + 1))
    await client.config_resetstat()
    reason, detail = await refusal(fetchers("key:frames:"), "key:frames:1")
    assert (reason, "65,537 bytes" in detail) == (Reason.TOO_LARGE, True)
    stats = await client.info("commandstats")
    assert "cmdstat_strlen" in stats
    assert "cmdstat_get" not in stats


async def test_server_that_is_away_says_nothing_of_a_reference() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client = make_client(RedisSettings(url=f"redis://127.0.0.1:{closed.getsockname()[1]}/0"))
        fetcher = ReferenceFetcher(ReferenceSettings(allow=("key:frames:",)), LIMITS, client, SystemClock())
        decoder = Decoder(1, LIMITS, SystemClock(), fetcher)
        entries = [
            Entry(entry_id(1), {b"category": b"a", b"image_ref": b"key:frames:1"}),
            Entry(entry_id(2), {b"category": b"a", b"image": IMAGE}),
        ]
        with pytest.raises(StreamUnavailableError):
            await decoder.decode(entries, [PixelForm(8)] * len(entries))
        decoder.close()
        await client.aclose()


async def test_key_that_the_user_may_not_read_is_unavailable_and_says_so(
    client: Redis, redis_settings: RedisSettings
) -> None:
    await client.acl_setuser("narrow", enabled=True, nopass=True, keys=["flawstream:*"], categories=["+@all"])
    narrow = make_client(redis_settings.model_copy(update={"username": "narrow"}))
    fetcher = ReferenceFetcher(ReferenceSettings(allow=("key:frames:",)), LIMITS, narrow, SystemClock())
    reason, detail = await refusal(fetcher, "key:frames:1")
    assert (reason, "may not read" in detail) == (Reason.UNAVAILABLE_REFERENCE, True)
    await narrow.aclose()
    await client.acl_deluser("narrow")


async def test_image_comes_over_http_with_its_query_and_nothing_of_ours(
    camera: Camera, fetchers: Fetchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    camera.answers["/images/1"] = lambda _: web.Response(body=IMAGE, headers={"Set-Cookie": "a=b"})
    fetcher = fetchers(camera.url("/images/"))
    for _ in range(2):
        assert await fetch(fetcher, camera.url(f"/images/1?{SECRET}%2F")) == IMAGE
    for request in camera.asked:
        assert (request.method, request.raw_path) == ("GET", f"/images/1?{SECRET}%2F")
        assert not {"Cookie", "Authorization", "Referer"} & set(request.headers)
        assert request.headers["Accept-Encoding"] == "identity"


async def test_localhost_is_allowed_where_the_list_names_it(camera: Camera, fetchers: Fetchers) -> None:
    fetcher = fetchers(camera.url("/images/", "localhost"))
    assert await fetch(fetcher, camera.url("/images/1", "localhost")) == IMAGE
    assert (await refusal(fetcher, camera.url("/images/1")))[0] is Reason.FORBIDDEN_REFERENCE


async def test_redirect_is_forbidden_and_never_followed(camera: Camera, fetchers: Fetchers) -> None:
    for status in (301, 302, 303, 307, 308):
        target = f"http://user:{SECRET}@{'127.0.0.1'}:{camera.port}/secrets?{SECRET}"
        camera.answers["/images/moved"] = lambda _, status=status, target=target: web.Response(  # type: ignore[misc]
            status=status, headers={"Location": target}
        )
        reason, detail = await refusal(fetchers(camera.url("/images/")), camera.url(f"/images/moved?{SECRET}"))
        assert reason is Reason.FORBIDDEN_REFERENCE
        assert f"redirects to http://127.0.0.1:{camera.port}/secrets," in detail
    assert camera.times("/secrets") == 0


@pytest.mark.parametrize("status", [201, 204, 206, 400, 401, 403, 404, 410])
async def test_image_that_is_not_there_is_unavailable_at_once(camera: Camera, fetchers: Fetchers, status: int) -> None:
    camera.answers["/images/2"] = lambda _: web.Response(status=status)
    reason, detail = await refusal(fetchers(camera.url("/images/")), camera.url("/images/2"))
    assert (reason, str(status) in detail) == (Reason.UNAVAILABLE_REFERENCE, True)
    assert camera.times("/images/2") == 1


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_server_in_trouble_is_asked_again(camera: Camera, fetchers: Fetchers, status: int) -> None:
    left = [status, status]
    camera.answers["/images/2"] = lambda _: web.Response(status=left.pop() if left else 200, body=IMAGE)
    assert await fetch(fetchers(camera.url("/images/")), camera.url("/images/2")) == IMAGE
    assert camera.times("/images/2") == 3


async def test_server_that_stays_in_trouble_is_asked_so_often_and_no_more(camera: Camera, fetchers: Fetchers) -> None:
    camera.answers["/images/2"] = lambda _: web.Response(status=500)
    reason, detail = await refusal(fetchers(camera.url("/images/"), tries=2), camera.url(f"/images/2?{SECRET}"))
    assert (reason, "500, 2 times" in detail) == (Reason.UNAVAILABLE_REFERENCE, True)
    assert camera.times("/images/2") == 2


async def test_server_that_does_not_answer_is_given_up_in_time(
    camera: Camera, fetchers: Fetchers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    camera.gate.clear()
    fetcher = fetchers(camera.url("/images/"), timeout_s=0.5, tries=1)
    assert (await refusal(fetcher, camera.url(f"/images/1?{SECRET}")))[0] is Reason.UNAVAILABLE_REFERENCE
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        reason, detail = await refusal(fetchers(nobody, tries=2), f"{nobody}1?{SECRET}")
    assert (reason, "2 times" in detail) == (Reason.UNAVAILABLE_REFERENCE, True)
    assert SECRET not in caplog.text


async def test_answer_that_grows_too_large_is_cut_off_whatever_the_server_said(
    camera: Camera, fetchers: Fetchers
) -> None:
    camera.answers["/images/large"] = lambda _: web.Response(body=b"x" * (LIMITS.max_image_bytes + 1))
    camera.answers["/images/fits"] = lambda _: web.Response(body=b"x" * LIMITS.max_image_bytes)
    fetcher = fetchers(camera.url("/images/"))
    assert len(await fetch(fetcher, camera.url("/images/fits"))) == LIMITS.max_image_bytes
    for name in ("large", "endless"):
        assert (await refusal(fetcher, camera.url(f"/images/{name}")))[0] is Reason.TOO_LARGE


async def test_answer_that_is_compressed_is_not_unpacked(camera: Camera, fetchers: Fetchers) -> None:
    camera.answers["/images/2"] = lambda _: web.Response(body=b"x", headers={"Content-Encoding": "gzip"})
    reason, detail = await refusal(fetchers(camera.url("/images/")), camera.url("/images/2"))
    assert (reason, "gzip" in detail) == (Reason.UNAVAILABLE_REFERENCE, True)


class Names(AbstractResolver):
    """Looks names up in a list of answers, the next one at each look."""

    def __init__(self, *answers: str) -> None:
        self.left = list(answers)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            {"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}
            for address in self.left.pop(0).split()
        ]

    async def close(self) -> None: ...


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "::ffff:127.0.0.1", "0.0.0.0 ::1"])
async def test_name_that_leads_to_a_forbidden_address_is_never_connected_to(
    camera: Camera, fetchers: Fetchers, address: str
) -> None:
    fetcher = fetchers(camera.url("/images/", "cam.test"))
    fetcher._sources["http"] = source = HttpSource(1 << 16, 5.0, 1, resolver=Names(address))  # noqa: SLF001
    reason, detail = await refusal(fetcher, camera.url(f"/images/1?{SECRET}", "cam.test"))
    assert (reason, "metadata" in detail) == (Reason.FORBIDDEN_REFERENCE, True)
    assert camera.asked == []
    await source.close()


async def test_checked_address_is_the_one_connected_to_and_a_name_that_changes_is_checked_anew(
    camera: Camera, fetchers: Fetchers
) -> None:
    camera.answers["/images/1"] = lambda _: web.Response(body=IMAGE, headers={"Connection": "close"})
    fetcher = fetchers(camera.url("/images/", "localhost"))
    names = Names("169.254.169.254 127.0.0.1", "169.254.169.254", "127.0.0.1")
    fetcher._sources["http"] = source = HttpSource(1 << 16, 5.0, 1, resolver=names)  # noqa: SLF001
    url = camera.url("/images/1", "localhost")
    assert await fetch(fetcher, url) == IMAGE
    assert len(names.left) == 2
    assert (await refusal(fetcher, url))[0] is Reason.FORBIDDEN_REFERENCE
    assert await fetch(fetcher, url) == IMAGE
    assert camera.times("/images/1") == 2
    await source.close()


async def test_no_more_images_are_fetched_and_held_at_once_than_allowed(camera: Camera, fetchers: Fetchers) -> None:
    fetcher = fetchers(camera.url("/images/"), concurrency=2)
    held = 0
    most_held = 0
    two = asyncio.Barrier(2)

    async def hold() -> None:
        nonlocal held, most_held
        async with fetcher.fetch(camera.url("/images/1")):
            held += 1
            most_held = max(most_held, held)
            await two.wait()
            await asyncio.sleep(0.01)  # time for a third, were it let in
            held -= 1

    await asyncio.gather(*(hold() for _ in range(12)))
    assert (most_held, camera.times("/images/1")) == (2, 12)


async def test_images_by_reference_and_by_bytes_are_decoded_together_each_for_itself(
    client: Redis, camera: Camera, fetchers: Fetchers
) -> None:
    await client.set("frames:1", png(50))
    await client.set("frames:2", b"no image")
    refs = ["key:frames:1", camera.url("/images/1"), "key:frames:2", "file:///etc/passwd", "key:frames:3"]
    entries = [
        Entry(entry_id(number), {b"category": b"a", b"image_ref": ref.encode(), b"image": b""})
        for number, ref in enumerate(refs)
    ]
    entries.append(Entry(entry_id(9), {b"category": b"a", b"image": png(70)}))
    decoder = Decoder(2, LIMITS, SystemClock(), fetchers("key:frames:", camera.url("/images/")))
    opened = await decoder.decode(entries, [PixelForm(8)] * len(entries))
    decoder.close()
    assert [one.image.pixels[0, 0, 0] if isinstance(one, DecodedEntry) else one and one.reason for one in opened] == [
        50,
        128,
        Reason.UNDECODABLE,
        Reason.FORBIDDEN_REFERENCE,
        Reason.UNAVAILABLE_REFERENCE,
        70,
    ]
    assert isinstance(opened[0], DecodedEntry)
    assert opened[0].message.image is None


async def test_without_a_fetcher_every_reference_is_forbidden() -> None:
    decoder = Decoder(1, LIMITS, SystemClock())
    (outcome,) = await decoder.decode(
        [Entry(entry_id(1), {b"category": b"a", b"image_ref": b"key:frames:1"})], [PixelForm(8)]
    )
    decoder.close()
    assert isinstance(outcome, MessageError)
    assert (outcome.reason, "not enabled" in str(outcome)) == (Reason.FORBIDDEN_REFERENCE, True)
