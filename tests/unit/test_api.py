"""The HTTP API over a fake detector, called without a socket."""

import base64
import io
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from fakes import FakeDetector, png
from pydantic import SecretStr

from flawstream.imaging.maps import decode_map
from schemas.errors import (
    BacklogFullError,
    ConfigError,
    DetectorOverloadedError,
    MessageError,
    Reason,
    StreamUnavailableError,
)
from schemas.messages import AnomalyMap, MapCodec
from schemas.settings import ApiSettings, LimitSettings
from serving.api.api import build_api
from serving.api.security import warn_if_open
from workers.ports import Deferral, Refusal

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

LIMITS = LimitSettings(max_image_bytes=4096, max_pixels=10_000)


class FakePusher:
    """A `Pusher` that keeps what it was given. `failures` are raised, one a call."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.pushed: list[dict[str, object]] = []

    async def push(
        self,
        image: bytes,
        category: str,
        *,
        id: str | None = None,  # noqa: A002 - the field's name on the wire
        captured_at: datetime | None = None,
        traceparent: str | None = None,
    ) -> str:
        if self.failures:
            raise self.failures.pop(0)
        fields = {"image": image, "category": category, "id": id, "captured_at": captured_at}
        self.pushed.append(fields | {"traceparent": traceparent})
        return f"1-{len(self.pushed)}"


class Bench:
    """An API, its detector, its stream, and what its status says."""

    def __init__(self, settings: ApiSettings | None = None) -> None:
        self.detector = FakeDetector()
        self.pusher = FakePusher()
        self.status: dict[str, object] | Exception = {"detector": {"images": 3}, "worker": {"read": 5}}
        api = build_api(self.detector, self.pusher, self._tell, settings or ApiSettings(), LIMITS)
        self.api = api
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://flawstream")

    async def _tell(self) -> dict[str, object]:
        if isinstance(self.status, Exception):
            raise self.status
        return self.status

    async def push(self, data: bytes, headers: Mapping[str, str] | None = None, **query: str) -> httpx.Response:
        return await self.client.post(
            "/v1/images", params={"category": "bottle"} | query, content=data, headers=headers
        )

    async def detect(self, data: bytes | AsyncIterator[bytes], **query: str) -> httpx.Response:
        return await self.client.post("/v1/detect", params={"category": "bottle"} | query, content=data)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.client:
        yield bench


def refusal(response: httpx.Response) -> tuple[int, str]:
    """Read a refusal; nothing of our insides may be in any."""
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    problem = response.json()
    assert set(problem) == {"reason", "detail"}
    assert problem["detail"]
    return response.status_code, problem["reason"]


async def test_healthz_says_that_the_process_lives(bench: Bench) -> None:
    response = await bench.client.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_readyz_passes_on_what_the_service_says(bench: Bench) -> None:
    response = await bench.client.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "detector": {"images": 3}, "worker": {"read": 5}}


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (DetectorOverloadedError("no replica took the call"), "no replica took the call"),
        (RuntimeError('Traceback\n  File "x.py", line 1'), "RuntimeError"),
    ],
)
async def test_readyz_is_503_and_says_why_when_not_ready(bench: Bench, error: Exception, detail: str) -> None:
    bench.status = error
    response = await bench.client.get("/readyz")
    assert refusal(response) == (503, "not_ready")
    assert detail in response.json()["detail"]
    assert response.headers["Retry-After"] == "1"


async def test_image_is_judged_without_a_map_by_default(bench: Bench) -> None:
    response = await bench.detect(png(50, (30, 40)), id="cam1-7")
    assert response.status_code == 200
    answer = response.json()
    assert (answer["id"], answer["category"], answer["verdict"]) == ("cam1-7", "bottle", "normal")
    assert (answer["score"], answer["threshold"], answer["p_value"]) == (0.5, 1.0, 0.25)
    assert answer["model"] == "bottle@v1"
    assert answer["image_shape"] == [30, 40]
    assert answer["map"] is None
    assert answer["total_ms"] >= answer["detect_ms"] >= 0
    assert bench.detector.batches == [["bottle"]]


async def test_image_without_an_id_is_given_one(bench: Bench) -> None:
    ids = {(await bench.detect(png())).json()["id"] for _ in range(3)}
    assert len(ids) == 3


async def test_anomalous_image_has_boxes(bench: Bench) -> None:
    answer = (await bench.detect(png(200, (30, 40)))).json()
    assert answer["verdict"] == "anomalous"
    (box,) = answer["boxes"]
    assert box == {"x": 0, "y": 0, "width": 40, "height": 30, "score": 2.0}


@pytest.mark.parametrize("codec", [MapCodec.GRID_F16, MapCodec.F16, MapCodec.PNG16])
async def test_map_comes_back_as_the_detector_gave_it(bench: Bench, codec: MapCodec) -> None:
    answer = (await bench.detect(png(50), map=codec)).json()["map"]
    data = base64.b64decode(answer.pop("data"), validate=True)
    decoded = decode_map(AnomalyMap(data=data, **answer))
    np.testing.assert_allclose(decoded, np.full((8, 8), 0.5), atol=1e-3)


async def test_heatmap_is_a_jpeg(bench: Bench) -> None:
    answer = (await bench.detect(png(50), map="heatmap-jpeg")).json()["map"]
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(answer["data"]), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert picture.shape == (*answer["shape"], 3)


async def test_body_past_the_limit_is_413_and_read_no_further_whatever_content_length_says(bench: Bench) -> None:
    sent = io.BytesIO()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            sent.write(bytes(1024))
            yield bytes(1024)

    request = bench.client.build_request(
        "POST", "/v1/detect", params={"category": "bottle"}, content=endless(), headers={"Content-Length": "10"}
    )
    response = await bench.client.send(request)
    assert refusal(response) == (413, "too_large")
    assert len(sent.getvalue()) <= LIMITS.max_image_bytes + 1024
    assert bench.detector.batches == []


async def test_image_of_too_many_pixels_is_413(bench: Bench) -> None:
    assert refusal(await bench.detect(png(0, (101, 100)))) == (413, "too_large")


@pytest.mark.parametrize("data", [b"no image", png()[:40]], ids=["text", "half a PNG"])
async def test_bytes_that_are_no_image_are_415(bench: Bench, data: bytes) -> None:
    assert refusal(await bench.detect(data)) == (415, "undecodable")


async def test_unknown_category_is_404(bench: Bench) -> None:
    bench.detector.unknown["nope"] = Refusal(Reason.UNKNOWN_CATEGORY, "category 'nope' has no version")
    response = await bench.detect(png(), category="nope")
    assert refusal(response) == (404, "unknown_category")
    assert response.json()["detail"] == "category 'nope' has no version"


async def test_category_whose_version_cannot_be_used_now_is_503(bench: Bench) -> None:
    bench.detector.unknown["cap"] = Deferral("the current version of 'cap' cannot be used")
    response = await bench.detect(png(), category="cap")
    assert refusal(response) == (503, "model_unavailable")
    assert response.headers["Retry-After"] == "1"


async def test_empty_body_is_422_and_shows_how(bench: Bench) -> None:
    response = await bench.detect(b"")
    assert refusal(response) == (422, "malformed")
    assert "curl --data-binary" in response.json()["detail"]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"category": "../etc"}, "category"),
        ({"map": "jpeg"}, "map"),
        ({"id": "x" * 257}, "id"),
        ({"category": ""}, "category"),
    ],
    ids=["category", "map", "id", "no category"],
)
async def test_bad_parameter_is_422_and_named(bench: Bench, query: dict[str, str], named: str) -> None:
    response = await bench.detect(png(), **query)
    assert refusal(response) == (422, "malformed")
    assert f"query.{named}" in response.json()["detail"]
    assert "../etc" not in response.text


async def test_missing_category_is_422(bench: Bench) -> None:
    response = await bench.client.post("/v1/detect", content=png())
    assert refusal(response) == (422, "malformed")
    assert "query.category: Field required" in response.json()["detail"]


async def test_busy_detector_is_503_with_retry_after(bench: Bench) -> None:
    bench.detector.failures = [DetectorOverloadedError("3 images wait and 2 may")]
    response = await bench.detect(png())
    assert refusal(response) == (503, "detector_overloaded")
    assert response.headers["Retry-After"] == "1"
    assert (await bench.detect(png())).status_code == 200


async def test_bug_is_500_without_its_text(bench: Bench) -> None:
    bench.detector.failures = [ValueError("/srv/secret.py said no")]
    response = await bench.detect(png())
    assert refusal(response) == (500, "internal")
    assert "secret" not in response.text


async def test_message_error_of_the_detector_keeps_its_reason(bench: Bench) -> None:
    bench.detector.failures = [MessageError(Reason.TOO_LARGE, "too much of it")]
    assert refusal(await bench.detect(png())) == (413, "too_large")


async def test_openapi_names_every_status_and_the_image_types(bench: Bench) -> None:
    document = (await bench.client.get("/openapi.json")).json()
    detect = document["paths"]["/v1/detect"]["post"]
    assert set(detect["responses"]) == {"200", "401", "404", "408", "413", "414", "415", "422", "500", "503"}
    for status, response in detect["responses"].items():
        (schema,) = (content["schema"]["$ref"] for content in response["content"].values())
        assert schema.endswith("/DetectionBody" if status == "200" else "/Problem")
    assert "image/png" in detect["requestBody"]["content"]
    assert {parameter["name"] for parameter in detect["parameters"]} == {"category", "id", "map"}
    assert set(document["paths"]["/readyz"]["get"]["responses"]) == {"200", "503"}
    assert "HTTPValidationError" not in json.dumps(document["paths"])


async def test_image_is_pushed_and_accepted(bench: Bench) -> None:
    response = await bench.push(png(), id="cam1-7", captured_at="2026-01-01T12:00:00Z")
    assert (response.status_code, response.json()) == (202, {"id": "cam1-7", "entry_id": "1-1"})
    assert bench.pusher.pushed == [
        {
            "image": png(),
            "category": "bottle",
            "id": "cam1-7",
            "captured_at": datetime(2026, 1, 1, 12, tzinfo=UTC),
            "traceparent": None,
        }
    ]
    assert bench.detector.batches == []


async def test_pushed_image_without_an_id_has_the_entry_s(bench: Bench) -> None:
    assert (await bench.push(png())).json() == {"id": "1-1", "entry_id": "1-1"}
    assert bench.pusher.pushed[0]["id"] is None


async def test_capture_time_may_come_as_a_header_with_its_plus_as_it_is(bench: Bench) -> None:
    response = await bench.push(png(), {"Captured-At": "2026-01-01T12:00:00+02:00"})
    assert response.status_code == 202
    captured_at = bench.pusher.pushed[0]["captured_at"]
    assert isinstance(captured_at, datetime)
    assert captured_at.utcoffset() == timedelta(hours=2)


async def test_trace_context_is_passed_on_and_a_malformed_one_is_no_error(bench: Bench) -> None:
    context = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await bench.push(png(), {"traceparent": context})
    response = await bench.push(png(), {"traceparent": "x" * 9000})
    assert response.status_code == 202
    assert [one["traceparent"] for one in bench.pusher.pushed] == [context, None]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (BacklogFullError("10 images wait"), 429, "backlog_full"),
        (StreamUnavailableError("no answer"), 503, "stream_unavailable"),
        (MessageError(Reason.TOO_LARGE, "too large"), 413, "too_large"),
        (MessageError(Reason.MALFORMED, "no"), 422, "malformed"),
        (ConfigError("the server refuses user x at 10.0.0.1"), 500, "config"),
    ],
)
async def test_push_that_fails_says_why(bench: Bench, error: Exception, status: int, reason: str) -> None:
    bench.pusher.failures = [error]
    response = await bench.push(png())
    assert refusal(response) == (status, reason)
    assert ("Retry-After" in response.headers) == (status in (429, 503))
    assert "10.0.0.1" not in response.text


async def test_pushed_body_past_the_limit_is_413_and_nothing_is_pushed(bench: Bench) -> None:
    assert refusal(await bench.push(bytes(4097))) == (413, "too_large")
    assert refusal(await bench.push(b"")) == (422, "malformed")
    assert refusal(await bench.push(png(), captured_at="2026-01-01T12:00:00")) == (422, "malformed")
    assert bench.pusher.pushed == []


async def test_client_that_goes_away_in_the_middle_is_no_bug(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/images",
        "query_string": b"category=bottle",
        "headers": [],
    }
    await bench.api(scope, receive, send)  # type: ignore[arg-type]  # starlette's mappings are mutable
    assert bench.pusher.pushed == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


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


async def test_documentation_needs_no_other_host(bench: Bench) -> None:
    page = await bench.client.get("/docs")
    assert page.status_code == 200
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert linked
    for address in linked:
        assert address.startswith("/")
        assert (await bench.client.get(address)).status_code == 200


async def test_query_that_is_too_long_is_414(bench: Bench) -> None:
    assert refusal(await bench.push(png(), junk="x" * 4096)) == (414, "too_large")
    assert bench.pusher.pushed == []
    assert (await bench.push(png(), id="\N{WHITE SMILING FACE}" * 256)).status_code == 202


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
