"""Bytes to pixels: every format the same way, upright, and nothing hostile gets further than its header."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from flawstream.imaging.decode import decode_image
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.errors import MessageError, Reason
from schemas.settings import LimitSettings

LIMITS = LimitSettings()
SIZE = 32
FORM = PixelForm(SIZE)
ORIENTATION = 0x0112
LOSSLESS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("WEBP", {"lossless": True}),
]
LOSSY: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {"quality": 95, "subsampling": 0}),
    ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    ("WEBP", {"quality": 95}),
]


def picture(height: int = 48, width: int = 80) -> NDArray[np.uint8]:
    """Make a smooth RGB picture without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (255 * x / width, 255 * y / height, 128 * (x / width) * (y / height))
    return np.stack(channels, axis=-1).astype(np.uint8)


def encode(pixels: NDArray[Any] | Image.Image, image_format: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def turned(pixels: NDArray[np.uint8], image_format: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(pixels, image_format, exif=exif, **options)


def decode(data: bytes, size: int = SIZE) -> Pixels:
    image = decode_image(data, PixelForm(size), LIMITS)
    assert image.pixels.shape == (size, size, 3)
    assert image.pixels.dtype == np.uint8
    assert image.pixels.flags.c_contiguous
    return image.pixels


def difference(a: Pixels, b: Pixels) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).max())


REFERENCE = decode(encode(picture(), "PNG"))


def test_reference_is_the_area_average() -> None:
    assert difference(REFERENCE, cv2.resize(picture(), (SIZE, SIZE), interpolation=cv2.INTER_AREA)) == 0


@pytest.mark.parametrize(("image_format", "options"), LOSSLESS)
def test_lossless_formats_give_the_same_pixels(image_format: str, options: dict[str, Any]) -> None:
    image = decode_image(encode(picture(), image_format, **options), FORM, LIMITS)
    assert difference(image.pixels, REFERENCE) == 0
    assert image.original_shape == (48, 80)


@pytest.mark.parametrize(("image_format", "options"), LOSSY)
def test_lossy_formats_give_nearly_the_same_pixels(image_format: str, options: dict[str, Any]) -> None:
    image = decode_image(encode(picture(), image_format, **options), FORM, LIMITS)
    assert difference(image.pixels, REFERENCE) <= 8
    assert image.original_shape == (48, 80)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_image_smaller_than_the_model_is_enlarged(image_format: str) -> None:
    image = decode_image(encode(picture(8, 12), image_format), PixelForm(64), LIMITS)
    assert image.pixels.shape == (64, 64, 3)
    assert image.original_shape == (8, 12)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_grey_becomes_three_equal_channels(image_format: str) -> None:
    pixels = decode(encode(picture()[:, :, 0], image_format))
    assert difference(pixels[:, :, 0], REFERENCE[:, :, 0]) <= 4
    assert difference(pixels[:, :, :1], pixels) <= 1  # WebP has no grey: rounding of its colours


def with_alpha(alpha: int) -> NDArray[np.uint8]:
    return np.concatenate([picture(), np.full((48, 80, 1), alpha, np.uint8)], axis=-1)


@pytest.mark.parametrize(("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_alpha_is_dropped_and_not_blended(image_format: str, options: dict[str, Any]) -> None:
    assert difference(decode(encode(with_alpha(7), image_format, **options)), REFERENCE) == 0


def test_opaque_alpha_of_a_tiff_changes_nothing() -> None:
    assert difference(decode(encode(with_alpha(255), "TIFF")), REFERENCE) == 0


def test_palette_becomes_its_colours() -> None:
    flat = np.zeros((40, 40, 3), np.uint8)
    flat[:, 20:] = (200, 100, 50)
    assert difference(decode(encode(Image.fromarray(flat).quantize(4), "PNG")), decode(encode(flat, "PNG"))) <= 1


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_to_eight(suffix: str) -> None:
    levels = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE)
    data = cv2.imencode(suffix, levels.astype(np.uint16))[1].tobytes()
    assert np.abs(decode(data)[:, :, 1] - levels / 257).max() <= 1


def test_cmyk_jpeg_becomes_rgb() -> None:
    data = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert difference(decode(data), REFERENCE) <= 10


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_turned_camera_gives_an_upright_image_in_every_format(image_format: str, orientation: int) -> None:
    data = turned(picture(), image_format, orientation)
    # Pillow's own word on what the orientation means.
    with Image.open(io.BytesIO(turned(picture(), "PNG", orientation))) as stored:
        stored.load()
        method = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }.get(orientation)
        upright = np.asarray(stored if method is None else stored.transpose(method))
    image = decode_image(data, FORM, LIMITS)
    assert image.original_shape == upright.shape[:2]
    assert difference(image.pixels, decode(encode(upright, "PNG"))) <= 10
    assert image.pixels.flags.c_contiguous


@pytest.mark.parametrize(
    "exif", [b"", b"garbage", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08"]
)
def test_jpeg_with_damaged_exif_is_taken_as_it_lies(exif: bytes) -> None:
    plain = encode(picture(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert difference(decode(plain[:2] + segment + plain[2:]), decode(plain)) == 0


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientation_that_means_nothing_is_ignored(orientation: int) -> None:
    assert difference(decode(turned(picture(), "JPEG", orientation)), decode(encode(picture(), "JPEG"))) == 0


def test_jpeg_with_more_pictures_behind_it_is_its_first() -> None:
    other = Image.fromarray(255 - picture())
    data = encode(picture(), "MPO", save_all=True, append_images=[other])
    assert difference(decode(data), decode(encode(picture(), "JPEG"))) == 0


def test_large_jpeg_is_decoded_at_a_smaller_scale_and_looks_the_same() -> None:
    large = picture(480, 800)
    data = encode(large, "JPEG", quality=95)
    image = decode_image(data, FORM, LIMITS)
    assert image.original_shape == (480, 800)
    assert difference(image.pixels, decode(encode(large, "PNG"))) <= 8


ALL = [*LOSSLESS, *LOSSY]


@pytest.mark.parametrize(("image_format", "options"), ALL)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95])
def test_truncated_image_is_refused_and_never_half_decoded(
    image_format: str, options: dict[str, Any], share: float
) -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noisy, image_format, **options)
    with pytest.raises(MessageError) as caught:
        decode(data[: int(share * len(data))])
    assert caught.value.reason is Reason.UNDECODABLE


SEEDS = [encode(picture(), image_format, **options) for image_format, options in ALL]
SEEDS.append(turned(picture(), "JPEG", 6))
flips = st.lists(st.tuples(st.integers(0, 10**6) | st.integers(0, 64), st.integers(1, 255)), min_size=1, max_size=6)


@given(st.sampled_from(SEEDS), flips)
def test_flipped_bits_raise_nothing_but_a_message_error(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for position, mask in changes:
        damaged[position % len(damaged)] ^= mask
    try:
        image = decode_image(bytes(damaged), FORM, LIMITS)
    except MessageError as error:
        assert error.reason in (Reason.UNDECODABLE, Reason.TOO_LARGE)  # noqa: PT017 - it need not raise
    else:
        assert image.pixels.shape == (SIZE, SIZE, 3)


@given(st.binary(max_size=64))
@example(b"")
@example(b"\xff\xd8\xff")
@example(b"GIF89a\x01\x00\x01\x00\x00\x00\x00")
@example(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
def test_what_is_no_image_is_undecodable(data: bytes) -> None:
    with pytest.raises(MessageError) as caught:
        decode_image(data, FORM, LIMITS)
    assert caught.value.reason is Reason.UNDECODABLE


def png_header(width: int, height: int) -> bytes:
    """Make a PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(8001, 8000), (20_000, 20_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1)]
)
def test_decompression_bomb_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    def decoded(*_: object, **__: object) -> None:
        pytest.fail("it was decoded")

    monkeypatch.setattr(cv2, "imdecode", decoded)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", decoded)
    with pytest.raises(MessageError, match=r"send a smaller image") as caught:
        decode_image(png_header(width, height), FORM, LIMITS)
    assert caught.value.reason is Reason.TOO_LARGE


def test_limits_hold_to_the_pixel() -> None:
    limits = LimitSettings(max_pixels=48 * 80, max_aspect=80 / 48)
    assert decode_image(encode(picture(), "PNG"), FORM, limits).original_shape == (48, 80)
    for wider, words in (
        (picture(48, 81), "max_pixels"),
        (picture(40, 72), "max_aspect"),
        (picture(72, 40), "max_aspect"),
    ):
        with pytest.raises(MessageError, match=words) as caught:
            decode_image(encode(wider, "PNG"), FORM, limits)
        assert caught.value.reason is Reason.TOO_LARGE


def test_png_chunk_that_claims_more_than_there_is_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("OpenCV would take 2 GB"))
    data = bytearray(encode(picture(), "PNG"))
    start = data.index(b"IDAT") - 4
    data[start : start + 4] = struct.pack(">I", 2**31 - 1)
    with pytest.raises(MessageError, match="ends in the middle of a chunk") as caught:
        decode_image(bytes(data), FORM, LIMITS)
    assert caught.value.reason is Reason.UNDECODABLE


def test_png_of_endless_chunks_is_refused() -> None:
    data = encode(picture(), "PNG")
    empty = struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))
    start = data.index(b"IDAT") - 4
    with pytest.raises(MessageError, match="more than 8,192 chunks"):
        decode_image(data[:start] + empty * 70_000 + data[start:], FORM, LIMITS)


def test_png_with_something_behind_its_end_is_fine() -> None:
    assert difference(decode(encode(picture(), "PNG") + b"trailer"), REFERENCE) == 0
