"""Files of 16 bits of which the camera fills 8, 10, 12 or 14: all their levels are kept, by the depth that is given."""

import io
import struct
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flawstream.imaging.decode import decode_image, read_levels
from flawstream.imaging.levels import Levels, bit_depth_of
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.errors import MessageError
from schemas.settings import BitDepth, LimitSettings

LIMITS = LimitSettings()
SIDE = 32
GREY = np.random.default_rng(0).integers(0, 256, (48, 80), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (48, 80, 3), np.uint8)
DEPTHS: list[BitDepth] = [8, 10, 12, 14, 16]


def encode(stored: NDArray[Any], suffix: str) -> bytes:
    return cv2.imencode(suffix, stored[:, :, ::-1] if stored.ndim == 3 else stored)[1].tobytes()


def filled(picture: NDArray[np.uint8], bits: int) -> NDArray[np.uint16]:
    """Store a picture as a camera of so many bits does, with noise in the lower ones."""
    noise = np.random.default_rng(2).integers(0, 1 << (bits - 8), picture.shape)
    return ((picture.astype(np.uint16) << (bits - 8)) + noise).astype(np.uint16)


def decode(data: bytes, bits: BitDepth = 16, resize: Any = "area") -> Pixels:
    return decode_image(data, PixelForm(SIDE, resize, bits), LIMITS).pixels


def signed_tiff(stored: NDArray[np.int16]) -> bytes:
    height, width = stored.shape
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 277: 1, 278: height, 279: stored.nbytes, 339: 2}
    at = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = sorted((tags | {273: at}).items())
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + stored.tobytes()


@pytest.mark.parametrize("bits", DEPTHS)
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("picture", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("resize", ["area", "antialias"])
def test_picture_is_that_of_eight_bits(picture: NDArray[np.uint8], suffix: str, bits: BitDepth, resize: str) -> None:
    data = encode(filled(picture, bits), suffix)
    assert np.array_equal(decode(data, bits, resize), decode(encode(picture, ".png"), resize=resize))


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_both_byte_orders_are_read(byte_order: str) -> None:
    file = io.BytesIO()
    Image.fromarray(filled(GREY, 12).astype(f"{byte_order}u2")).save(file, "TIFF")
    assert np.array_equal(decode(file.getvalue(), 12), decode(encode(GREY, ".png")))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_dark_image_is_read_by_the_depth_that_is_given_and_not_by_its_own(suffix: str) -> None:
    dark = filled(GREY, 12) >> 3
    data = encode(dark, suffix)
    assert dark.max() < 1 << 10
    assert np.array_equal(decode(data, 12), decode(encode((dark >> 4).astype(np.uint8), ".png")))
    assert decode(data, 12).max() < 32


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_levels_over_the_depth_are_white_and_do_not_wrap(suffix: str) -> None:
    stored = np.array([[0, 4095], [4096, 65535]], np.uint16).repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)
    image = decode_image(encode(stored, suffix), PixelForm(SIDE, bits=12), LIMITS)
    assert [int(image.pixels[y, x, 0]) for y in (0, -1) for x in (0, -1)] == [0, 255, 255, 255]
    assert image.levels == Levels(0, 65535, 12)
    assert image.depth == 12


@pytest.mark.parametrize("bits", DEPTHS)
def test_image_of_eight_bits_is_the_same_at_every_depth(bits: BitDepth) -> None:
    for suffix in (".png", ".tiff", ".bmp", ".jpg", ".webp"):
        data = encode(COLOUR, suffix)
        assert np.array_equal(decode(data, bits), decode(data))
        assert decode_image(data, PixelForm(SIDE, bits=bits), LIMITS).depth is None


def test_signed_tiff_is_read_by_the_bits_that_it_has_and_black_below_zero() -> None:
    full = signed_tiff(GREY.astype(np.int16) << 7)
    assert np.array_equal(decode(full), decode(encode(GREY, ".png")))
    twelve = signed_tiff(filled(GREY, 12).astype(np.int16))
    assert np.array_equal(decode(twelve, 12), decode(encode(GREY, ".png")))
    below = signed_tiff(np.full((SIDE, SIDE), -300, np.int16))
    image = decode_image(below, PixelForm(SIDE), LIMITS)
    assert not image.pixels.any()
    assert image.levels == Levels(-300, -300, 16)


def test_levels_are_read_of_files_with_16_bits_alone() -> None:
    assert read_levels(encode(filled(GREY, 12), ".tiff"), LIMITS) == Levels(3, 4095, 16)
    assert read_levels(encode(GREY, ".tiff"), LIMITS) is None
    assert read_levels(encode(GREY, ".jpg"), LIMITS) is None


@pytest.mark.parametrize(
    ("highest", "bits"), [(0, 8), (255, 8), (256, 10), (1023, 10), (1024, 12), (4096, 14), (16383, 14), (65535, 16)]
)
def test_depth_is_the_smallest_of_a_camera_that_holds_the_highest_level(highest: int, bits: int) -> None:
    assert bit_depth_of(highest) == bits


def test_picture_over_pillow_s_own_bound_is_not_refused_by_it() -> None:
    """Its 178,956,970 pixels are no limit of ours."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "BMP")
    data = file.getvalue()[:18] + struct.pack("<ii", 14_000, 13_000) + file.getvalue()[26:]
    assert read_levels(data, LIMITS) is None
    with pytest.raises(MessageError, match="182,000,000 pixels are more than the allowed 64,000,000"):
        decode_image(data, PixelForm(SIDE), LIMITS)
