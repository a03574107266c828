"""Images pushed over HTTP: accepted, refused with a reason, and never half."""

import logging
from datetime import UTC, datetime, timedelta

import pytest
from helpers.api_bench import Bench, refusal
from helpers.fakes import png

from schemas.errors import BacklogFullError, ConfigError, MessageError, Reason, StreamUnavailableError

pytestmark = pytest.mark.anyio


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
    messages: list[dict[str, object]] = [
        {"type": "http.request", "body": b"half", "more_body": True},
        {"type": "http.disconnect"},
    ]
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


async def test_query_that_is_too_long_is_414(bench: Bench) -> None:
    assert refusal(await bench.push(png(), junk="x" * 4096)) == (414, "too_large")
    assert bench.pusher.pushed == []
    assert (await bench.push(png(), id="\N{WHITE SMILING FACE}" * 256)).status_code == 202


@pytest.mark.parametrize("time", ["0.5", "1764313200", "20261128", "yesterday", "2026-11-28T06:00:00"])
async def test_capture_time_without_a_date_and_a_zone_is_422(bench: Bench, time: str) -> None:
    assert refusal(await bench.push(b"image", captured_at=time))[0] == 422
    assert bench.pusher.pushed == []
