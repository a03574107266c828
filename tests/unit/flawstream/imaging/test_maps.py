"""Maps: every codec within its stated error, boxes in the original's pixels, and no damage that passes unseen."""

import contextlib
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from flawstream.imaging.maps import decode_map, encode_jpeg, encode_map, find_boxes, paint, upsample
from schemas.errors import MessageError, Reason
from schemas.messages import AnomalyMap, MapCodec

SHAPE = (64, 64)
NUMERIC = [MapCodec.GRID_F16, MapCodec.F16, MapCodec.PNG16]
PNG16_STEP = 64 / 65535
grid_values = st.floats(0, 60, width=16)
grid_lists = st.lists(st.integers(1, 9), min_size=1, max_size=3).flatmap(
    lambda sides: st.tuples(*(npst.arrays(np.float16, (side, side + 1), elements=grid_values) for side in sides))
)
Grids = tuple[NDArray[np.float16], ...]


def make_grids() -> Grids:
    rng = np.random.default_rng(3)
    return tuple(rng.gamma(2.0, 0.5, (side, side)).astype(np.float16) for side in (16, 8, 4))


@given(grid_lists)
def test_native_grids_arrive_to_the_last_bit(grids: Grids) -> None:
    decoded = decode_map(encode_map(grids, SHAPE, MapCodec.GRID_F16, threshold=1.0))
    np.testing.assert_array_equal(decoded, upsample(grids, SHAPE))


def test_native_grids_in_half_precision_lose_less_than_a_thousandth() -> None:
    exact = [np.random.default_rng(k).gamma(2.0, 0.5, (s, s)).astype(np.float32) for k, s in enumerate((32, 16, 8))]
    encoded = encode_map([grid.astype(np.float16) for grid in exact], SHAPE, MapCodec.GRID_F16, threshold=1.0)
    np.testing.assert_allclose(decode_map(encoded), upsample(exact, SHAPE), rtol=1e-3)


@given(grid_lists)
def test_f16_loses_half_a_step_of_half_precision(grids: Grids) -> None:
    values = upsample(grids, SHAPE)
    decoded = decode_map(encode_map(grids, SHAPE, MapCodec.F16, threshold=1.0))
    np.testing.assert_allclose(decoded, values, rtol=2**-11, atol=2**-25)


@given(grid_lists)
def test_png16_loses_half_a_level(grids: Grids) -> None:
    values = upsample(grids, SHAPE)
    decoded = decode_map(encode_map(grids, SHAPE, MapCodec.PNG16, threshold=1.0))
    np.testing.assert_allclose(decoded, values, rtol=1e-5, atol=PNG16_STEP * 0.51)


def test_png16_clips_what_is_past_its_range() -> None:
    decoded = decode_map(encode_map([np.full((2, 2), 100.0, np.float16)], SHAPE, MapCodec.PNG16, threshold=1.0))
    np.testing.assert_allclose(decoded, 64.0)


@pytest.mark.parametrize("codec", NUMERIC)
def test_map_need_not_be_square(codec: MapCodec) -> None:
    assert decode_map(encode_map(make_grids(), (40, 72), codec, threshold=1.0)).shape == (40, 72)


def test_native_grids_are_much_smaller_than_pixels() -> None:
    sizes = {codec: len(encode_map(make_grids(), (256, 256), codec, threshold=1.0).data) for codec in NUMERIC}
    assert sizes[MapCodec.GRID_F16] == 2 * (16 * 16 + 8 * 8 + 4 * 4)
    assert sizes[MapCodec.F16] == 2 * 256 * 256


def test_heatmap_is_a_picture_and_holds_no_values() -> None:
    encoded = encode_map(make_grids(), SHAPE, MapCodec.HEATMAP_JPEG, threshold=2.0)
    picture = cv2.imdecode(np.frombuffer(encoded.data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert picture.shape == (*SHAPE, 3)
    with pytest.raises(MessageError, match="heatmap-jpeg has no values"):
        decode_map(encoded)


def test_no_map_holds_no_values() -> None:
    encoded = encode_map(make_grids(), SHAPE, MapCodec.NONE, threshold=1.0)
    assert encoded == AnomalyMap(codec=MapCodec.NONE)
    with pytest.raises(MessageError, match="none has no values"):
        decode_map(encoded)


@pytest.mark.parametrize("codec", NUMERIC)
@pytest.mark.parametrize(
    "damage",
    [
        {"data": b""},
        {"data": b"\0"},
        {"shape": (0, 0)},
        {"shape": (64, 0)},
        {"shape": (10**6, 10**6)},
        {"shape": (1, 10**6)},
    ],
    ids=str,
)
def test_map_that_does_not_fit_its_shape_is_malformed(codec: MapCodec, damage: dict[str, object]) -> None:
    encoded = encode_map(make_grids(), SHAPE, codec, threshold=1.0)
    with pytest.raises(MessageError) as caught:
        decode_map(encoded.model_copy(update=damage))
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("codec", NUMERIC)
def test_truncated_map_is_malformed(codec: MapCodec) -> None:
    encoded = encode_map(make_grids(), SHAPE, codec, threshold=1.0)
    for count in (len(encoded.data) - 2, len(encoded.data) // 2, 30):
        with pytest.raises(MessageError):
            decode_map(encoded.model_copy(update={"data": encoded.data[:count]}))


@pytest.mark.parametrize("grids", [(), ((4, 4),), ((16, 16), (8, 8), (4, 4), (0, 0)), ((336, 1, 1),), ((0, 5),)])
def test_grids_that_do_not_fit_the_bytes_are_malformed(grids: tuple[tuple[int, ...], ...]) -> None:
    encoded = encode_map(make_grids(), SHAPE, MapCodec.GRID_F16, threshold=1.0)
    with pytest.raises(MessageError):
        decode_map(encoded.model_copy(update={"grids": grids}))


@given(
    st.sampled_from(MapCodec),
    st.tuples(st.integers(0, 99), st.integers(0, 99)),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3).map(tuple),
    st.binary(max_size=200),
)
def test_no_bytes_raise_another_error(
    codec: MapCodec, shape: tuple[int, int], grids: tuple[tuple[int, int], ...], data: bytes
) -> None:
    try:
        values = decode_map(AnomalyMap(codec=codec, shape=shape, grids=grids, data=data))
    except MessageError as error:
        assert error.reason is Reason.MALFORMED  # noqa: PT017 - it need not raise
    else:
        assert values.shape == shape


@given(st.lists(st.tuples(st.integers(0, 10**5), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bits_of_a_png_raise_no_other_error(changes: list[tuple[int, int]]) -> None:
    encoded = encode_map(make_grids(), (16, 16), MapCodec.PNG16, threshold=1.0)
    damaged = bytearray(encoded.data)
    for position, mask in changes:
        damaged[position % len(damaged)] ^= mask
    with contextlib.suppress(MessageError):
        assert decode_map(encoded.model_copy(update={"data": bytes(damaged)})).shape == (16, 16)


def test_png_of_another_size_or_depth_is_malformed_before_it_is_unpacked() -> None:
    encoded = encode_map(make_grids(), SHAPE, MapCodec.PNG16, threshold=1.0)
    bomb = bytearray(encoded.data)
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    eight_bits = cv2.imencode(".png", np.zeros(SHAPE, np.uint8))[1].tobytes()
    colours = cv2.imencode(".png", np.zeros((*SHAPE, 3), np.uint16))[1].tobytes()
    for data, words in ((bytes(bomb), "another size"), (eight_bits, "16 bits"), (colours, "does not fit")):
        with pytest.raises(MessageError, match=words):
            decode_map(encoded.model_copy(update={"data": data}))


def test_scales_are_averaged() -> None:
    grids = [np.full((4, 4), 1.0, np.float16), np.full((2, 2), 4.0, np.float16)]
    np.testing.assert_array_equal(upsample(grids, (8, 8)), np.full((8, 8), 2.5))


def hot(*regions: tuple[int, int, int, int, float], shape: tuple[int, int] = SHAPE) -> NDArray[np.float32]:
    values = np.zeros(shape, np.float32)
    for x, y, width, height, score in regions:
        values[y : y + height, x : x + width] = score
    return values


def test_boxes_are_in_pixels_of_the_original_the_highest_first() -> None:
    boxes = find_boxes(hot((8, 16, 4, 2, 3.0), (40, 40, 8, 8, 5.0)), 1.0, (128, 640))
    assert [(b.x, b.y, b.width, b.height, b.score) for b in boxes] == [(400, 80, 80, 16, 5.0), (80, 32, 40, 4, 3.0)]


def test_regions_that_touch_at_a_corner_are_one() -> None:
    (box,) = find_boxes(hot((0, 0, 4, 4, 2.0), (4, 4, 4, 4, 3.0)), 1.0, SHAPE)
    assert (box.x, box.y, box.width, box.height, box.score) == (0, 0, 8, 8, 3.0)


def test_value_at_the_threshold_is_normal() -> None:
    assert find_boxes(hot((0, 0, 4, 4, 1.0)), 1.0, SHAPE) == ()


def test_only_the_highest_boxes_are_kept() -> None:
    values = hot(*((8 * k, 0, 2, 2, float(k + 1)) for k in range(8)))
    assert [box.score for box in find_boxes(values, 0.5, SHAPE, most=3)] == [8.0, 7.0, 6.0]


def test_region_of_infinite_value_has_a_finite_score() -> None:
    (box,) = find_boxes(hot((0, 0, 2, 2, np.inf)), 1.0, SHAPE)
    assert np.isfinite(box.score)


@given(
    npst.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12))),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_boxes_cover_every_hot_pixel_and_stay_inside_the_image(
    mask: NDArray[np.bool_], image_shape: tuple[int, int]
) -> None:
    boxes = find_boxes(mask.astype(np.float32), 0.5, image_shape, most=mask.size)
    for box in boxes:
        assert box.x + box.width <= image_shape[1]
        assert box.y + box.height <= image_shape[0]
    down, across = image_shape[0] / mask.shape[0], image_shape[1] / mask.shape[1]
    for row, column in np.argwhere(mask):
        assert any(
            box.x <= column * across + 1e-9
            and (column + 1) * across <= box.x + box.width + 1e-9
            and box.y <= row * down + 1e-9
            and (row + 1) * down <= box.y + box.height + 1e-9
            for box in boxes
        )


def test_paint_goes_from_blue_to_red() -> None:
    cold, warm = paint(np.asarray([[0.0, 9.0]], np.float32), threshold=2.0)[0]
    assert cold[2] > cold[0]
    assert warm[0] > warm[2]


def test_picture_keeps_its_colours_as_jpeg() -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, :, 0] = 255
    decoded = cv2.imdecode(np.frombuffer(encode_jpeg(red), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert decoded is not None
    assert np.abs(decoded.astype(int) - red).max() <= 4
