"""Images pushed over HTTP onto a real server, as a user with a password: what is refused, and what is never logged."""

import io
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from helpers.fakes import FakeDetector, png
from helpers.streams import rows
from PIL import Image
from pydantic import SecretStr

from schemas.settings import ApiSettings, BacklogSettings, LimitSettings, RedisSettings
from serving.api.api import build_api
from workers.acl import Role, access_rules
from workers.produce.producer import Producer
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio

PASSWORD, TOKEN = "pass-of-the-api", "token-of-line-7"
CONTEXT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
async def settings(redis_settings: RedisSettings) -> RedisSettings:
    async with make_client(redis_settings) as admin:
        rules = access_rules(Role.PRODUCER, redis_settings.prefix)
        await admin.execute_command("ACL", "SETUSER", "api", "reset", "on", f">{PASSWORD}", *rules.split())
    return RedisSettings(url=redis_settings.url, username="api", password=SecretStr(PASSWORD))


@asynccontextmanager
async def serving(settings: RedisSettings, *, max_images: int = 10) -> AsyncIterator[httpx.AsyncClient]:
    producer = Producer(settings, backlog=BacklogSettings(max_images=max_images))

    async def status() -> dict[str, object]:
        return {}

    api = build_api(FakeDetector(), producer, status, ApiSettings(tokens=(SecretStr(TOKEN),)), LimitSettings())
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(api), base_url="http://localhost", headers=headers
    ) as client:
        yield client
    await producer.close()


async def push(client: httpx.AsyncClient, image: bytes | None = None, **query: str) -> httpx.Response:
    body = png() if image is None else image
    headers = {"traceparent": CONTEXT}
    return await client.post("/v1/images", params={"category": "bottle"} | query, content=body, headers=headers)


async def test_pushed_image_is_on_the_stream_with_what_came_with_it(
    settings: RedisSettings, redis_settings: RedisSettings
) -> None:
    async with serving(settings) as client, make_client(redis_settings) as admin:
        answers = [await push(client, id="cam1-7", captured_at="2026-01-01T12:00:00Z") for _ in range(2)]
        ((entry_id, fields),) = await rows(admin, "flawstream:images")
    assert [answer.status_code for answer in answers] == [202, 202]
    assert [answer.json() for answer in answers] == 2 * [{"id": "cam1-7", "entry_id": entry_id}]
    assert fields == {
        b"id": b"cam1-7",
        b"category": b"bottle",
        b"image": png(),
        b"captured_at": b"2026-01-01T12:00:00+00:00",
        b"traceparent": CONTEXT.encode(),
    }


async def test_full_backlog_is_429_and_there_is_room_again_when_images_have_ended(
    settings: RedisSettings, redis_settings: RedisSettings
) -> None:
    async with serving(settings, max_images=2) as client, make_client(redis_settings) as admin:
        answers = [await push(client) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202, 202, 429]
        assert answers[-1].json()["reason"] == "backlog_full"
        assert answers[-1].headers["Retry-After"] == "1"
        await admin.xdel("flawstream:images", answers[0].json()["entry_id"])
        assert (await push(client)).status_code == 202


async def test_another_image_with_the_same_id_is_409(settings: RedisSettings, redis_settings: RedisSettings) -> None:
    async with serving(settings) as client, make_client(redis_settings) as admin:
        first = await push(client, id="cam1-7")
        answer = await push(client, png(200), id="cam1-7")
        assert await admin.xlen("flawstream:images") == 1
    assert (first.status_code, answer.status_code) == (202, 409)
    assert answer.json()["reason"] == "id_conflict"


async def test_server_that_is_away_is_503(settings: RedisSettings) -> None:
    async with serving(settings.model_copy(update={"url": "redis://127.0.0.1:1/0"})) as client:
        answer = await push(client)
    assert (answer.status_code, answer.json()["reason"]) == (503, "stream_unavailable")
    assert "Retry-After" in answer.headers


async def test_neither_image_nor_password_nor_token_is_ever_logged(
    settings: RedisSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    image, described = png() + b"SECRET-PIXELS", io.BytesIO()
    Image.new("RGB", (8, 8)).save(described, "TIFF", description="SECRET-WORDS")
    caplog.clear()
    wrong = settings.model_copy(update={"password": SecretStr("another-password")})
    nobody = settings.model_copy(update={"url": "redis://127.0.0.1:1/0"})
    statuses = []
    for used, max_images in ((settings, 2), (wrong, 2), (nobody, 2)):
        async with serving(used, max_images=max_images) as client:
            statuses += [(await push(client, image)).status_code for _ in range(3)]
            for judged in (image, described.getvalue()):
                answer = await client.post("/v1/detect", params={"category": "bottle"}, content=judged)
                statuses.append(answer.status_code)
            statuses.append((await push(client, image, category="../etc")).status_code)
            client.headers["Authorization"] = "Bearer wrong-guess"
            statuses.append((await push(client, image)).status_code)
    assert set(statuses) == {200, 202, 401, 422, 429, 500, 503}
    assert caplog.records
    for secret in ("SECRET-PIXELS", "IHDR", "SECRET-WORDS", PASSWORD, "another-password", TOKEN, "wrong-guess"):
        assert secret not in caplog.text
