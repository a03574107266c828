"""The wire: what is written reads back, and no bytes raise anything but a MessageError."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import MessageError, Reason
from schemas.messages import AnomalyMap, Box, DeadLetter, DetectionResult, ImageMessage, MapCodec, Verdict
from schemas.settings import LimitSettings
from schemas.wire import (
    MAX_FIELDS,
    dead_letter_fields,
    image_fields,
    parse_dead_letter,
    parse_image,
    parse_result,
    result_fields,
)

LIMITS = LimitSettings()
ENTRY_ID = "1700000000000-0"
OURS = {*DetectionResult.model_fields, *ImageMessage.model_fields, "map_codec", "map_shape", "map_grids"}

zones = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(datetime(1970, 1, 2), datetime(9998, 1, 1), timezones=zones)  # noqa: DTZ001 - timezones= adds it
ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64)
categories = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
traces = st.none() | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True)
extras = st.dictionaries(ids.filter(lambda name: name not in OURS), st.binary(max_size=32), max_size=4)
# Floats travel with nine significant digits, which is every float32.
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32).map(lambda value: float(f"{value:.9g}"))
milliseconds = st.integers(0, 10**9).map(lambda value: value / 1000)
shapes = st.tuples(st.integers(0, 9999), st.integers(0, 9999))

images = st.builds(
    ImageMessage,
    id=ids,
    category=categories,
    image=st.binary(min_size=1, max_size=64),
    captured_at=st.none() | moments,
    traceparent=traces,
    extra=extras,
)
images |= st.builds(ImageMessage, id=ids, category=categories, image_ref=ids, captured_at=st.none() | moments)
maps = st.just(AnomalyMap(codec=MapCodec.NONE)) | st.builds(
    AnomalyMap,
    codec=st.sampled_from([codec for codec in MapCodec if codec is not MapCodec.NONE]),
    shape=shapes,
    grids=st.lists(shapes, max_size=3).map(tuple),
    data=st.binary(max_size=64),
)
boxes = st.builds(
    Box,
    x=st.integers(0, 9999),
    y=st.integers(0, 9999),
    width=st.integers(1, 9999),
    height=st.integers(1, 9999),
    score=st.floats(allow_nan=False, allow_infinity=False),
)
results = st.builds(
    DetectionResult,
    id=ids,
    category=categories,
    score=numbers,
    p_value=st.floats(0.001, 1.0).map(lambda value: float(f"{value:.9g}")),
    threshold=numbers,
    verdict=st.sampled_from(Verdict),
    model=ids,
    map=maps,
    boxes=st.lists(boxes, max_size=3).map(tuple),
    image_shape=shapes,
    captured_at=st.none() | moments,
    queued_ms=milliseconds,
    decode_ms=milliseconds,
    detect_ms=milliseconds,
    total_ms=milliseconds,
    traceparent=traces,
    extra=extras,
)
letters = st.builds(
    DeadLetter,
    fields=st.dictionaries(st.binary(max_size=8) | st.just(b"dead.drop"), st.binary(max_size=32), max_size=4),
    reason=st.sampled_from(Reason),
    detail=ids,
    deliveries=st.integers(1, 10**6),
    failed_at=moments,
    entry_id=ids,
)
RESULT = result_fields(
    DetectionResult(
        id="1",
        category="a",
        score=1.0,
        p_value=0.5,
        threshold=2.0,
        verdict=Verdict.NORMAL,
        model="a@1",
        map=AnomalyMap(codec=MapCodec.F16, shape=(1, 1), data=b"ab"),
        image_shape=(4, 4),
    )
)
LETTER = dead_letter_fields(
    DeadLetter(
        fields={b"image": b"x"},
        reason=Reason.POISON,
        detail="why",
        deliveries=1,
        failed_at=datetime(2026, 11, 23, tzinfo=UTC),
        entry_id=ENTRY_ID,
    )
)


@given(images)
def test_image_message_reads_back_as_it_was(message: ImageMessage) -> None:
    assert parse_image(ENTRY_ID, image_fields(message), LIMITS) == message


@given(results)
def test_result_reads_back_as_it_was(result: DetectionResult) -> None:
    assert parse_result(result_fields(result)) == result


@given(letters)
def test_dead_letter_reads_back_with_the_original_fields_untouched(letter: DeadLetter) -> None:
    assert parse_dead_letter(dead_letter_fields(letter)) == letter


@given(images, results)
def test_what_a_producer_sends_along_reaches_the_result(message: ImageMessage, result: DetectionResult) -> None:
    parsed = parse_image(ENTRY_ID, image_fields(message), LIMITS)
    assert parse_result(result_fields(result.model_copy(update={"extra": parsed.extra}))).extra == message.extra


@given(st.sampled_from(sorted(set(DetectionResult.model_fields) - {"extra"})), results)
def test_extra_field_with_one_of_our_names_gives_way(name: str, result: DetectionResult) -> None:
    shadowed = result.model_copy(update={"extra": {name: b"theirs", "theirs": b"kept"}})
    assert parse_result(result_fields(shadowed)) == result.model_copy(update={"extra": {"theirs": b"kept"}})


field_names = st.sampled_from([name.encode() for name in sorted(OURS)]) | st.binary(max_size=12)
entries = st.dictionaries(field_names, st.binary(max_size=64), max_size=8)


@given(entries)
def test_no_bytes_make_an_image_message_raise_another_error(fields: dict[bytes, bytes]) -> None:
    try:
        message = parse_image(ENTRY_ID, {b"category": b"bottle", b"image": b"x"} | fields, LIMITS)
    except MessageError:
        return
    assert parse_image(ENTRY_ID, image_fields(message), LIMITS) == message


@given(entries, st.sampled_from(sorted(RESULT)), st.binary(max_size=16))
def test_no_bytes_make_a_result_raise_another_error(fields: dict[bytes, bytes], damaged: bytes, value: bytes) -> None:
    for entry in (fields, RESULT | fields, RESULT | {damaged: value}):
        try:
            parse_result(entry)
        except MessageError as error:
            assert error.reason is Reason.MALFORMED  # noqa: PT017 - it need not raise


@given(entries, st.sampled_from(sorted(LETTER)) | st.just(b"dead.\xff"), st.binary(max_size=16))
def test_no_bytes_make_a_dead_letter_raise_another_error(
    fields: dict[bytes, bytes], damaged: bytes, value: bytes
) -> None:
    for entry in (fields, LETTER | fields, LETTER | {damaged: value}):
        try:
            parse_dead_letter(entry)
        except MessageError as error:
            assert error.reason is Reason.MALFORMED  # noqa: PT017 - it need not raise


@pytest.mark.parametrize("boxes", [b"5", b"null", b"{}", b"[5]", b"[", b"[" * 100_000, b'[{"x":-1}]'])
def test_boxes_that_are_none_are_malformed(boxes: bytes) -> None:
    with pytest.raises(MessageError) as caught:
        parse_result(RESULT | {b"boxes": boxes})
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("shape", [b"-1x4", b"4", b"4x4x4", b"x", b"", b"4x1.5"])
def test_shapes_that_are_none_are_malformed(shape: bytes) -> None:
    for name in (b"map_shape", b"image_shape"):
        with pytest.raises(MessageError):
            parse_result(RESULT | {name: shape})


def test_plain_producer_needs_category_and_image_only() -> None:
    message = parse_image(ENTRY_ID, {b"category": b"bottle", b"image": b"x"}, LIMITS)
    assert message == ImageMessage(id=ENTRY_ID, category="bottle", image=b"x")
    assert parse_image(ENTRY_ID, {b"category": b"bottle", b"image": b"x", b"id": b""}, LIMITS) == message


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({}, Reason.MALFORMED, "image is absent"),
        ({b"image": b""}, Reason.MALFORMED, "image is absent or empty"),
        ({b"image": b"", b"image_ref": b""}, Reason.MALFORMED, "image is absent or empty"),
        ({b"image": b"x", b"image_ref": b"s3://bucket/a.png"}, Reason.MALFORMED, "send one of them"),
        ({b"image_ref": b"\xff"}, Reason.MALFORMED, "field image_ref is not UTF-8"),
        ({b"image": b"x", b"category": b"../etc"}, Reason.MALFORMED, "category"),
        ({b"image": b"x", b"category": b"a\n"}, Reason.MALFORMED, "category"),
        ({b"image": b"x", b"category": b"\xff"}, Reason.MALFORMED, "field category is not UTF-8"),
        ({b"image": b"x", b"id": b"i" * 257}, Reason.MALFORMED, "id"),
        ({b"image": b"x", b"captured_at": b"yesterday"}, Reason.MALFORMED, "captured_at"),
        ({b"image": b"x", b"captured_at": b"0.5"}, Reason.MALFORMED, "captured_at.*date and a zone"),
        ({b"image": b"x", b"captured_at": b"2026-11-23T13:45:00"}, Reason.MALFORMED, "captured_at.*timezone"),
    ],
)
def test_refusal_names_the_field(fields: dict[bytes, bytes], reason: Reason, words: str) -> None:
    with pytest.raises(MessageError, match=words) as caught:
        parse_image(ENTRY_ID, {b"category": b"bottle"} | fields, LIMITS)
    assert caught.value.reason is reason


def test_absent_category_is_malformed() -> None:
    with pytest.raises(MessageError, match="category"):
        parse_image(ENTRY_ID, {b"image": b"x"}, LIMITS)


def test_refusal_does_not_repeat_a_long_value() -> None:
    with pytest.raises(MessageError) as caught:
        parse_image(ENTRY_ID, {b"image": b"x", b"category": b"!" * 60_000}, LIMITS)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("absent", [{}, {b"image": b""}])
def test_reference_stands_in_for_the_bytes_wherever_it_leads(absent: dict[bytes, bytes]) -> None:
    fields = {b"category": b"bottle", b"image_ref": b"file:///etc/passwd"}
    message = parse_image(ENTRY_ID, fields | absent, LIMITS)
    assert message == ImageMessage(id=ENTRY_ID, category="bottle", image_ref="file:///etc/passwd")


def test_empty_reference_beside_the_bytes_is_absent() -> None:
    message = parse_image(ENTRY_ID, {b"category": b"bottle", b"image": b"x", b"image_ref": b""}, LIMITS)
    assert (message.image, message.image_ref) == (b"x", None)


@pytest.mark.parametrize("value", [b"", b"00-xyz", b"\xff\xfe", b"00-" + b"0" * 32])
def test_malformed_traceparent_is_ignored_as_w3c_asks(value: bytes) -> None:
    message = parse_image(ENTRY_ID, {b"category": b"a", b"image": b"x", b"traceparent": value}, LIMITS)
    assert message.traceparent is None


def test_field_name_that_is_no_text_is_handed_through_escaped() -> None:
    message = parse_image(ENTRY_ID, {b"category": b"a", b"image": b"x", b"\xff": b"\xff"}, LIMITS)
    assert message.extra == {"\\xff": b"\xff"}


def test_sizes_are_refused_one_byte_past_the_limit() -> None:
    limits = LimitSettings(max_image_bytes=1024, max_fields_bytes=256)
    base = {b"category": b"a"}
    rest = limits.max_fields_bytes - len(b"category") - len(b"a") - len(b"note")
    fitting = base | {b"image": b"x" * 1024, b"note": b"n" * rest}
    assert parse_image(ENTRY_ID, fitting, limits).extra == {"note": b"n" * rest}
    for field, name in ((b"image", "limits.max_image_bytes"), (b"note", "limits.max_fields_bytes")):
        with pytest.raises(MessageError, match=name) as caught:
            parse_image(ENTRY_ID, fitting | {field: fitting[field] + b"x"}, limits)
        assert caught.value.reason is Reason.TOO_LARGE


def test_too_many_fields_are_refused() -> None:
    many = {f"{k}".encode(): b"" for k in range(MAX_FIELDS)}
    with pytest.raises(MessageError, match="fields") as caught:
        parse_image(ENTRY_ID, {b"category": b"a", b"image": b"x"} | many, LIMITS)
    assert caught.value.reason is Reason.TOO_LARGE
