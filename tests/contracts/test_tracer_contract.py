"""What every `Tracer` does: on OpenTelemetry's SDK, and where nobody collects."""

import re
from collections.abc import Iterator

import pytest
from helpers.otlp_receiver import receiving

from flawstream.telemetry.choose_tracer import open_tracer
from flawstream.telemetry.traces import NO_TRACER, Attributes, Span, Tracer
from schemas.settings import TracingSettings

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED, NOT_SAMPLED = (f"00-{TRACE}-b7ad6b7169203331-{flags}" for flags in ("01", "00"))
MALFORMED = ("", "x", "00-0-0-01", f"00-{'0' * 32}-{'0' * 16}-01", "\N{SNOWMAN}")
ABOUT: Attributes = {"image_id": "part-7", "category": "bottle", "deliveries": 1, "score": 0.5}
WHOLE, PART = Span("image", 1_000, 9_000), Span("decode", 2_000, 3_000)


class TracerContract:
    """The law."""

    @pytest.mark.parametrize("traceparent", [SAMPLED, NOT_SAMPLED], ids=["sampled", "not sampled"])
    def test_what_is_sent_along_is_of_the_trace_that_came(self, tracer: Tracer, traceparent: str) -> None:
        with tracer.push(traceparent, ABOUT) as sent:
            assert sent is not None
        assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-{traceparent[-2:]}", sent)

    def test_a_push_of_no_trace_sends_none_or_begins_one(self, tracer: Tracer) -> None:
        with tracer.push(None, ABOUT) as sent:
            pass
        assert sent is None or re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", sent)

    @pytest.mark.parametrize("traceparent", MALFORMED)
    def test_a_traceparent_that_is_none_fails_nothing(self, tracer: Tracer, traceparent: str) -> None:
        with tracer.push(traceparent, ABOUT):
            pass
        tracer.image(traceparent, WHOLE, [PART], ABOUT, None)

    def test_a_push_that_fails_raises_its_own_error(self, tracer: Tracer) -> None:
        error = ValueError("the push's own")
        with pytest.raises(ValueError, match="the push's own") as caught, tracer.push(SAMPLED, ABOUT):
            raise error
        assert caught.value is error

    @pytest.mark.parametrize("traceparent", [None, SAMPLED, NOT_SAMPLED], ids=["none", "sampled", "not sampled"])
    @pytest.mark.parametrize("error", [None, "undecodable: no image"], ids=["result", "dead letter"])
    def test_an_image_may_end_in_any_way(self, tracer: Tracer, traceparent: str | None, error: str | None) -> None:
        for parts in ([], [PART], [PART, PART]):
            tracer.image(traceparent, WHOLE, parts, ABOUT, error)


class TestNoTracer(TracerContract):
    @pytest.fixture
    def tracer(self) -> Tracer:
        return NO_TRACER

    def test_what_came_is_sent_along_unchanged(self, tracer: Tracer) -> None:
        for traceparent in (None, SAMPLED, *MALFORMED):
            with tracer.push(traceparent, ABOUT) as sent:
                assert sent == traceparent


class TestOtelTracer(TracerContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tracer(cls) -> Iterator[Tracer]:
        with receiving() as receiver, open_tracer(TracingSettings(endpoint=receiver.url)) as tracer:
            yield tracer
