"""An image's way as spans, from a producer's push to the worker's result, at a real collector's port."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest
from helpers.fakes import FakeDetector, png
from helpers.otlp_receiver import Receiver, attributes, receiving
from helpers.raw_redis import RawRedis
from helpers.stream_work import working
from helpers.waiting import wait_until_async
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider

from flawstream.telemetry.choose_tracer import open_tracer
from flawstream.telemetry.traces import NO_TRACER, Tracer
from schemas.errors import ConfigError
from schemas.settings import RedisSettings, Settings, TracingSettings
from workers.consume.sharded import ShardedWorker
from workers.produce.producer import Producer
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def raw(redis_settings: RedisSettings) -> Iterator[RawRedis]:
    with RawRedis(int(redis_settings.url.rsplit(":", 1)[1].split("/")[0])) as raw:
        yield raw


async def work_off(redis: RedisSettings, raw: RawRedis, tracer: Tracer) -> None:
    """Have a worker end all images there are."""
    async with make_client(redis) as client:
        worker = ShardedWorker(client, "a", FakeDetector(), Settings(redis=redis), tracer=tracer)

        async def all_ended() -> bool:
            return await asyncio.to_thread(raw.count, "XLEN", "flawstream:images") == 0

        async with working(worker):
            await wait_until_async(all_ended, "no image is left")


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == f"flawstream.{name}"]


async def test_spans_lead_from_the_camera_over_the_push_to_every_stage_of_the_image(
    receiver: Receiver, redis_settings: RedisSettings, raw: RawRedis
) -> None:
    with open_tracer(TracingSettings(endpoint=receiver.url)) as tracer:
        async with Producer(redis_settings, tracer=tracer) as producer:
            await producer.push(png(), "bottle", id="part-7", traceparent=SAMPLED)
        await work_off(redis_settings, raw, tracer)
    ((_, result),) = raw.entries("flawstream:results")
    (push,), (image,) = named(receiver.spans, "push"), named(receiver.spans, "image")
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}
    assert (push.parent_span_id.hex(), push.kind) == (PARENT, Span.SPAN_KIND_PRODUCER)
    assert (image.parent_span_id, image.kind) == (push.span_id, Span.SPAN_KIND_CONSUMER)
    assert result["traceparent"].decode() == f"00-{TRACE}-{push.span_id.hex()}-01"
    stages = [span for span in receiver.spans if span.parent_span_id == image.span_id]
    assert [span.name.removeprefix("flawstream.") for span in stages] == [
        "queue",
        "decode",
        "call",
        "encode",
        "publish",
    ]
    for stage in stages:
        assert image.start_time_unix_nano <= stage.start_time_unix_nano <= stage.end_time_unix_nano
        assert stage.end_time_unix_nano <= image.end_time_unix_nano
    about = attributes(image)
    assert (about["flawstream.image_id"], about["flawstream.model"]) == ("part-7", "bottle@v1")
    assert (receiver.services, receiver.paths) == ({"flawstream"}, {"/v1/traces"})


async def test_a_dead_letter_is_a_span_with_an_error(
    receiver: Receiver, redis_settings: RedisSettings, raw: RawRedis
) -> None:
    raw("XADD", "flawstream:images", "*", "category", "bottle", "image", b"none", "traceparent", SAMPLED)
    with open_tracer(TracingSettings(endpoint=f"{receiver.url}/v1/traces")) as tracer:
        await work_off(redis_settings, raw, tracer)
    (image,) = named(receiver.spans, "image")
    assert (image.parent_span_id.hex(), image.status.code) == (PARENT, Status.STATUS_CODE_ERROR)
    assert "4 bytes that start with 6e 6f 6e 65 are text" in image.status.message
    assert receiver.paths == {"/v1/traces"}


async def test_what_the_producer_decided_not_to_trace_is_not_traced_and_goes_through_all_the_same(
    receiver: Receiver, redis_settings: RedisSettings, raw: RawRedis
) -> None:
    with open_tracer(TracingSettings(endpoint=receiver.url)) as tracer:
        async with Producer(redis_settings, tracer=tracer) as producer:
            await producer.push(png(), "bottle", traceparent=NOT_SAMPLED)
        await work_off(redis_settings, raw, tracer)
    ((_, result),) = raw.entries("flawstream:results")
    assert result["traceparent"].decode().startswith(f"00-{TRACE}-")
    assert result["traceparent"].decode().endswith("-00")
    assert receiver.spans == []


async def test_the_span_that_the_caller_is_in_is_the_parent_of_a_push(
    receiver: Receiver, redis_settings: RedisSettings
) -> None:
    caller = TracerProvider().get_tracer("a camera's program")
    with open_tracer(TracingSettings(endpoint=receiver.url)) as tracer:
        async with Producer(redis_settings, tracer=tracer) as producer:
            with caller.start_as_current_span("shot") as shot:
                await producer.push(png(), "bottle")
    (push,) = named(receiver.spans, "push")
    assert push.parent_span_id.hex() == f"{shot.get_span_context().span_id:016x}"


async def test_without_a_tracer_the_traceparent_goes_through_as_it_came(
    redis_settings: RedisSettings, raw: RawRedis
) -> None:
    async with Producer(redis_settings) as producer:
        await producer.push(png(), "bottle", traceparent=SAMPLED)
    await work_off(redis_settings, raw, NO_TRACER)
    ((_, result),) = raw.entries("flawstream:results")
    assert result["traceparent"].decode() == SAMPLED


async def test_a_collector_that_is_away_harms_no_image(redis_settings: RedisSettings, raw: RawRedis) -> None:
    with receiving() as receiver:
        url = receiver.url
    raw("XADD", "flawstream:images", "*", "category", "bottle", "image", png(), "traceparent", SAMPLED)
    with open_tracer(TracingSettings(endpoint=url)) as tracer:
        await work_off(redis_settings, raw, tracer)
    assert raw.count("XLEN", "flawstream:results") == 1


def test_where_no_endpoint_is_set_nothing_of_tracing_is_imported() -> None:
    program = (
        "import sys, workers.produce.producer, workers.consume.sharded\n"
        "from flawstream.telemetry.choose_tracer import open_tracer\n"
        "from schemas.settings import TracingSettings\n"
        "with open_tracer(TracingSettings()): pass\n"
        "ours = ('flawstream.telemetry.otel', 'opentelemetry.exporter', 'opentelemetry.sdk.trace')\n"
        "assert not [name for name in sys.modules if name.startswith(ours)]"  # redis-py imports its metrics
    )
    subprocess.run([sys.executable, "-c", program], check=True)  # noqa: S603 - our own program


def test_an_endpoint_without_the_packages_is_told_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flawstream.telemetry.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with (
        pytest.raises(ConfigError, match=r"flawstream\[otel\]"),
        open_tracer(TracingSettings(endpoint="http://127.0.0.1:4318")),
    ):
        pass
