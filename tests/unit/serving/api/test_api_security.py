"""Who is let in, what a browser is kept from, and what is never logged."""

import io
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from helpers.api_bench import Bench, refusal
from helpers.fakes import png
from pydantic import SecretStr

from schemas.errors import BacklogFullError, ConfigError
from schemas.settings import ApiSettings
from serving.api.security import warn_if_open

pytestmark = pytest.mark.anyio


TOKENS = ("first-token", "zweiter-tökën")


@pytest.fixture
async def guarded() -> AsyncIterator[Bench]:
    bench = Bench(ApiSettings(tokens=tuple(map(SecretStr, TOKENS))))
    async with bench.client:
        yield bench


@pytest.mark.parametrize("token", TOKENS)
async def test_each_token_opens_the_api(guarded: Bench, token: str) -> None:
    guarded.client.headers = httpx.Headers({b"Authorization": f"Bearer {token}".encode()})
    assert (await guarded.push(png())).status_code == 202
    assert (await guarded.detect(png())).status_code == 200


@pytest.mark.parametrize(
    ("header", "challenge"),
    [
        (None, "Bearer"),
        ("Bearer", "Bearer"),
        ("Basic first-token", "Bearer"),
        ("Bearer first-toke", 'Bearer error="invalid_token"'),
        ("Bearer first-token,zweiter-token", 'Bearer error="invalid_token"'),
        ("Bearer #", 'Bearer error="invalid_token"'),
    ],
)
async def test_request_without_a_token_of_ours_is_401_before_its_body_is_read(
    guarded: Bench, header: str | None, challenge: str
) -> None:
    sent = io.BytesIO()

    async def body() -> AsyncIterator[bytes]:
        sent.write(b"x")
        yield b"x"

    for path in ("/v1/images", "/v1/detect"):
        headers = {} if header is None else {"Authorization": header}
        response = await guarded.client.post(path, params={"category": "bottle"}, content=body(), headers=headers)
        assert refusal(response) == (401, "unauthorized")
        assert response.headers["WWW-Authenticate"] == challenge
    assert sent.getvalue() == b""
    assert guarded.pusher.pushed == []


async def test_every_path_but_those_of_health_needs_a_token_and_says_so_in_the_document(guarded: Bench) -> None:
    document = (await guarded.client.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"] == {
        "token": {"type": "http", "scheme": "bearer", "description": "Required if the service has tokens."}
    }
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            status = (await guarded.client.request(method, path)).status_code
            if path in ("/healthz", "/readyz"):
                assert status == 200
                assert "security" not in about
            else:
                assert status == 401
                assert about["security"] == [{"token": []}]


async def test_rotated_file_of_tokens_works_at_once_and_one_that_is_gone_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# of line 7\n\n  old  \n", encoding="utf-8")
    bench = Bench(ApiSettings(tokens_file=file))

    async def status(token: str) -> int:
        return (await bench.push(png(), {"Authorization": f"Bearer {token}"})).status_code

    async with bench.client:
        assert [await status(token) for token in ("old", "new", "", "# of line 7")] == [202, 401, 401, 401]
        file.write_text("new\n", encoding="utf-8")
        os.utime(file, ns=(1, 1))
        assert [await status(token) for token in ("old", "new")] == [401, 202]
        file.unlink()
        assert [await status(token) for token in ("old", "new")] == [401, 401]
        file.write_text("# none\n", encoding="utf-8")
        assert [await status(token) for token in ("new", "# none", "")] == [401, 401, 401]
        file.write_text("newer\n", encoding="utf-8")
        assert await status("newer") == 202


@pytest.mark.parametrize(
    ("content", "tokens", "said"),
    [("a", ("b",), "both set"), ("# none\n", (), "no token"), (None, (), "cannot be read"), (None, (" ",), "empty")],
)
def test_api_with_tokens_in_two_places_or_in_none_does_not_start(
    tmp_path: Path, content: str | None, tokens: tuple[str, ...], said: str
) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    named = None if said == "empty" else file
    with pytest.raises(ConfigError, match=said):
        Bench(ApiSettings(tokens=tuple(map(SecretStr, tokens)), tokens_file=named))


@pytest.mark.parametrize(
    ("host", "tokens", "warned"),
    [
        ("127.0.0.1", (), False),
        ("::1", (), False),
        ("localhost", (), False),
        ("0.0.0.0", (), True),  # noqa: S104 - what is warned of
        ("plant.example", (), True),
        ("0.0.0.0", ("t",), False),  # noqa: S104 - the same, with a token
    ],
)
def test_api_that_is_open_to_the_network_is_warned_of(
    caplog: pytest.LogCaptureFixture, *, host: str, tokens: tuple[str, ...], warned: bool
) -> None:
    warn_if_open(ApiSettings(host=host, tokens=tuple(map(SecretStr, tokens))))
    assert bool(caplog.records) == warned


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json", "/nowhere", "/v1/detect", "/bug"])
async def test_every_answer_has_the_headers_that_keep_browsers_from_harm(bench: Bench, path: str) -> None:
    bench.detector.failures = [ValueError("a bug")]
    response = await (bench.detect(png()) if path == "/bug" else bench.client.get(path))
    headers = response.headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Server" not in headers


async def test_nothing_that_is_sent_or_secret_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bench = Bench(ApiSettings(tokens=(SecretStr(TOKENS[0]),)))
    image = png() + b"SECRET-PIXELS"
    ours, theirs = {"Authorization": f"Bearer {TOKENS[0]}"}, {"Authorization": "Bearer a-wrong-guess"}
    async with bench.client:
        for failure in (None, BacklogFullError("full"), ValueError("a bug"), ConfigError("set up wrongly")):
            bench.pusher.failures = bench.detector.failures = [] if failure is None else [failure]
            await bench.push(image, ours)
            bench.client.headers = httpx.Headers(ours)
            bench.detector.failures = [] if failure is None else [failure]
            await bench.detect(image)
            await bench.detect(b"SECRET-PIXELS")
            bench.client.headers = httpx.Headers()
            await bench.push(image, theirs)
    assert bench.pusher.pushed
    assert "failed unexpectedly" in caplog.text
    for secret in ("SECRET-PIXELS", "PNG", TOKENS[0], "a-wrong-guess"):
        assert secret not in caplog.text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
async def test_request_under_a_foreign_name_is_refused_where_this_machine_alone_is_served(
    bench: Bench, host: str
) -> None:
    """A page whose name was made to lead to this machine is of the same origin for its browser."""
    response = await bench.push(b"image", headers={"Host": host})
    assert refusal(response) == (421, "unknown_host")
    assert bench.pusher.pushed == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
async def test_every_name_of_this_machine_is_its_own(bench: Bench, host: str) -> None:
    assert (await bench.push(b"image", headers={"Host": host})).status_code == 202


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        (ApiSettings(host="0.0.0.0"), "plant.example", 202),  # noqa: S104 - what is tested
        (ApiSettings(hosts=("Plant.example",)), "plant.example:80", 202),
        (ApiSettings(host="0.0.0.0", hosts=("plant.example",)), "localhost", 421),  # noqa: S104
    ],
)
async def test_names_are_those_of_the_settings(settings: ApiSettings, host: str, status: int) -> None:
    bench = Bench(settings)
    async with bench.client:
        assert (await bench.push(b"image", headers={"Host": host})).status_code == status


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:3000", "null", "http://localhost"])
async def test_page_of_another_site_pushes_nothing(bench: Bench, origin: str) -> None:
    response = await bench.push(b"image", headers={"Origin": origin, "Content-Type": "text/plain"})
    assert refusal(response) == (403, "foreign_origin")
    assert bench.pusher.pushed == []


async def test_own_pages_and_programs_push(bench: Bench) -> None:
    assert (await bench.push(b"image", headers={"Origin": "http://localhost:8000"})).status_code == 202
    assert (await bench.push(b"image")).status_code == 202


async def test_document_asks_for_no_token_where_there_are_none(bench: Bench) -> None:
    document = (await bench.client.get("/openapi.json")).json()
    assert not [about for methods in document["paths"].values() for about in methods.values() if "security" in about]
