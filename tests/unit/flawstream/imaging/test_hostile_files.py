"""Files that are small and dear: what decoding them would cost is known before it begins."""

import io
import struct
import threading
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile

from flawstream.imaging.decode import decode_image
from flawstream.imaging.jpeg import read_jpeg_header
from flawstream.imaging.memory import DecodingMemory
from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError, Reason
from schemas.settings import LimitSettings

LIMITS = LimitSettings()
FORM = PixelForm(32)


@pytest.fixture
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object, **__: object) -> None:
        pytest.fail("it was decoded")

    monkeypatch.setattr(cv2, "imdecode", decoded)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", decoded)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)


def refusal(data: bytes, limits: LimitSettings = LIMITS) -> MessageError:
    with pytest.raises(MessageError) as caught:
        decode_image(data, FORM, limits)
    return caught.value


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def progressive(width: int, height: int, more_scans: int) -> bytes:
    data = encode(Image.linear_gradient("L").resize((width, height)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * more_scans + data[-2:]


def png(width: int, height: int, bits: int, colour_type: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def tiff(side: int, *more: tuple[int, int, int, int], samples: int = 1, bits: int = 8) -> bytes:
    """One directory of (tag, type, count, value)."""
    entries = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, samples),
        *more,
    ]
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0) + bytes(4096)


@pytest.mark.usefixtures("nothing_is_decoded")
def test_jpeg_of_thousands_of_scans_is_refused() -> None:
    error = refusal(progressive(512, 512, 2_000))
    assert error.reason is Reason.UNDECODABLE
    assert "more than 1,024 scans" in str(error)


@pytest.mark.usefixtures("nothing_is_decoded")
def test_jpeg_of_some_scans_is_refused_where_it_is_large() -> None:
    """A scan takes as long as the picture has pixels."""
    error = refusal(progressive(64, 64, 100), LimitSettings(max_pixels=64 * 64))
    assert error.reason is Reason.TOO_LARGE
    assert "106 scans of 64 x 64 pixels" in str(error)
    assert "send a baseline JPEG" in str(error)


@pytest.mark.usefixtures("nothing_is_decoded")
@pytest.mark.parametrize("segment", [b"\xff\xfe\x00\x02", b"\xff\xe5\x00\x02", b"\xff\xd0"])
def test_jpeg_of_endless_segments_is_refused(segment: bytes) -> None:
    data = encode(Image.new("L", (64, 64)), "JPEG")
    error = refusal(data[:2] + segment * 1_000_000 + data[2:])
    assert error.reason is Reason.UNDECODABLE
    assert "more than 4,096 segments" in str(error)


def test_fill_bytes_before_a_marker_are_passed_over() -> None:
    """As many as there are: T.81, section B.1.1.2."""
    data = encode(Image.new("L", (64, 48)), "JPEG")
    assert read_jpeg_header(data[:2] + b"\xff" * 4_000_000 + data[2:]).width == 64


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_header_is_what_pillow_reads(options: dict[str, object], mode: str) -> None:
    data = encode(Image.effect_noise((90, 70), 60).convert(mode), "JPEG", **options)
    header = read_jpeg_header(data)
    assert (header.width, header.height, header.components) == (90, 70, len(Image.new(mode, (1, 1)).getbands()))
    assert (header.scan is None) == bool(options.get("progressive"))
    assert header.passes == (data.count(b"\xff\xda") if options.get("progressive") else 1)


@pytest.mark.parametrize("cut", [2, 3, 4, 20, 200])
def test_cut_header_is_refused(cut: int) -> None:
    data = encode(Image.new("L", (64, 48)), "JPEG")[:cut]
    with pytest.raises(ValueError, match=r"no frame or no scan|does not end inside"):
        read_jpeg_header(data)


@pytest.mark.usefixtures("nothing_is_decoded")
@pytest.mark.parametrize(("bits", "colour_type"), [(16, 2), (16, 6), (8, 6)])
def test_png_with_more_bits_than_the_largest_image_is_refused(bits: int, colour_type: int) -> None:
    error = refusal(png(8000, 8000, bits, colour_type))
    assert error.reason is Reason.TOO_LARGE
    assert "send fewer pixels, bits or channels" in str(error)


def test_png_with_sixteen_bits_is_taken_where_it_is_smaller() -> None:
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 15
    limits = LimitSettings(max_pixels=64 * 64)
    assert decode_image(cv2.imencode(".png", pixels)[1].tobytes(), FORM, limits).original_shape == (64, 64)


@pytest.mark.usefixtures("nothing_is_decoded")
def test_tile_that_is_larger_than_the_image_counts_as_it_is_stored() -> None:
    error = refusal(tiff(64, (322, 4, 1, 16_384), (323, 4, 1, 16_384), (324, 4, 1, 8), (325, 4, 1, 64)))
    assert error.reason is Reason.TOO_LARGE
    assert "268,435,456 bytes" in str(error)


@pytest.mark.usefixtures("nothing_is_decoded")
def test_strips_that_overlap_are_refused() -> None:
    error = refusal(tiff(64, (273, 4, 1, 8), (278, 4, 1, 64), (279, 4, 1, 1_000_000)))
    assert error.reason is Reason.UNDECODABLE
    assert "strips overlap" in str(error)


@pytest.mark.usefixtures("nothing_is_decoded")
def test_fax_page_is_refused() -> None:
    """Each of its thin stripes is a code of one bit: 8 MB of them took 3 s."""
    error = refusal(encode(Image.new("1", (64, 64)), "TIFF", compression="group4"))
    assert error.reason is Reason.UNDECODABLE
    assert "CCITT group 4" in str(error)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate"])
def test_tiff_as_programs_write_it_is_taken(compression: str) -> None:
    data = encode(Image.effect_noise((200, 300), 50), "TIFF", compression=compression)
    assert decode_image(data, FORM, LIMITS).original_shape == (300, 200)


def test_memory_is_granted_in_turn_and_never_over_the_limit() -> None:
    memory, used, most = DecodingMemory(), 0, 0
    lock, began = threading.Lock(), threading.Barrier(8)

    def work(size: int) -> None:
        nonlocal used, most
        began.wait()
        for _ in range(50):
            with memory.take(size, 100):
                with lock:
                    used += size
                    most = max(most, used)
                with lock:
                    used -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in (10, 20, 30, 40, 50, 60, 90, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert 0 < most <= 100


def test_image_that_is_larger_than_the_limit_is_decoded_alone() -> None:
    memory, order = DecodingMemory(), list[str]()

    def large() -> None:
        with memory.take(500, 100):
            order.append("large")

    with memory.take(10, 100):
        thread = threading.Thread(target=large)
        thread.start()
        thread.join(0.2)
        order.append("small is done")
    thread.join(60)
    assert order == ["small is done", "large"]


@pytest.mark.parametrize("compression", [cv2.IMWRITE_TIFF_COMPRESSION_LZW, cv2.IMWRITE_TIFF_COMPRESSION_ADOBE_DEFLATE])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_tiff_with_a_damaged_strip_is_refused(compression: int, channels: int) -> None:
    """It is decoded once: OpenCV reports damage where it keeps all bits, and leaves a hole where it does not."""
    levels = np.random.default_rng(0).integers(0, 1 << 16, (64, 64, channels), np.uint16)
    options = [cv2.IMWRITE_TIFF_COMPRESSION, compression, cv2.IMWRITE_TIFF_PREDICTOR, cv2.IMWRITE_TIFF_PREDICTOR_NONE]
    data = cv2.imencode(".tiff", levels, options)[1].tobytes()
    decode_image(data, FORM, LIMITS)
    error = refusal(data[:3000] + bytes(100) + data[3100:])
    assert error.reason is Reason.UNDECODABLE
    assert "the TIFF is damaged" in str(error)


def test_sixteen_bit_tiff_is_not_decoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("Pillow decodes it too"))
    levels = np.full((64, 64, 3), 0x5AFF, np.uint16)
    assert (
        decode_image(cv2.imencode(".tiff", levels)[1].tobytes(), FORM, LIMITS).pixels.tolist()
        == [[[0x5A] * 3] * 32] * 32
    )


def test_sixteen_bit_tiff_in_which_white_is_zero_is_inverted() -> None:
    levels = np.array([0x0000, 0x10FF, 0xFFFF], np.uint16)
    data = tiff(2, (273, 4, 1, 200), (278, 4, 1, 2), (279, 4, 1, 8), bits=16)
    data = data[:200] + levels[[0, 1, 2, 0]].tobytes() + data[208:]
    data = data.replace(struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0))
    pixels = decode_image(data, PixelForm(2), LIMITS).pixels
    assert pixels[:, :, 0].tolist() == [[255, 239], [0, 255]]
