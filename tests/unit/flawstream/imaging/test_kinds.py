"""A refusal names what the bytes are, and what to do."""

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from flawstream.imaging.decode import decode_image
from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError, Reason
from schemas.settings import LimitSettings

FORM = PixelForm(32)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))


def encode(image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, image_format, **options)
    return file.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(MessageError) as caught:
        decode_image(data, FORM, LimitSettings())
    assert caught.value.reason is Reason.UNDECODABLE
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the image is empty; send its bytes"),
        (bytes(500), "zeros; send the image when it has been written to its end"),
        *(
            (base64.b64encode(encode(name)), "an image in base64; decode it")
            for name in ("JPEG", "PNG", "WEBP", "TIFF")
        ),
        (base64.encodebytes(encode("BMP")), "an image in base64"),
        (b"data:image/png;base64,iVBORw0KGgo", "an image in base64"),
        (b'{"image": "..."}', "JSON"),
        (b' [{"image": "..."}]', "JSON"),
        (b"<!DOCTYPE html><title>404", "HTML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>", "XML"),
        (b"%PDF-1.7", "a PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (encode("AVIF"), "AVIF"),
        (encode("GIF"), "a GIF"),
        (encode("JPEG2000"), "JPEG 2000"),
        (encode("PPM"), "a PNM"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "a camera's RAW (CR3)"),
        (b"FUJIFILMCCD-RAW 0201", "a camera's RAW (RAF)"),
        (b"https://plant/images/7.png", "a URL; send it in image_ref"),
        (b"/mnt/images/7.png\n", "text; send a JPEG, PNG, WebP, BMP or TIFF, not its name"),
        (b"\r\n" + encode("JPEG"), "a JPEG behind other bytes; cut those off"),
        (np.full((8, 8), 300, np.uint16).tobytes(), "pixels as a camera gives them must be encoded first"),
    ],
)
def test_kind_of_bytes_is_named(data: bytes, words: str) -> None:
    assert words in refusal(data)


def test_tiff_of_floats_is_named() -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(file, "TIFF")
    assert "32 bits a sample" in refusal(file.getvalue())


def text_png(text: bytes = b"v") -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "v" * len(text))
    return encode("PNG", pnginfo=info).replace(b"tEXtk\0" + b"v" * len(text), b"tEXtk\0" + text)


def test_png_with_a_damaged_text_is_judged() -> None:
    expected = decode_image(encode("PNG"), FORM, LimitSettings()).pixels
    damaged = text_png(b"w")
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(damaged)).load()
    assert np.array_equal(decode_image(damaged, FORM, LimitSettings()).pixels, expected)


@pytest.mark.parametrize("kind", [b"tIME", b"pHYs", b"gAMA", b"iCCP", b"eXIf", b"zTXt", b"tRNS"])
@pytest.mark.parametrize("body", [b"", b"\xff" * 20])
def test_no_ancillary_chunk_with_a_wrong_checksum_changes_the_picture(kind: bytes, body: bytes) -> None:
    data = encode("PNG")
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ 1)
    strange = data[:33] + chunk + data[33:]
    expected = decode_image(data, FORM, LimitSettings()).pixels
    assert np.array_equal(decode_image(strange, FORM, LimitSettings()).pixels, expected)


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"PLTE"])
def test_critical_chunk_with_a_wrong_checksum_stays_refused(kind: bytes) -> None:
    file = io.BytesIO()
    (PICTURE.quantize(8) if kind == b"PLTE" else PICTURE).save(file, "PNG")
    data = bytearray(file.getvalue())
    at = data.index(kind)
    data[at + 4 + int.from_bytes(data[at - 4 : at], "big")] ^= 1
    assert "the PNG is damaged" in refusal(bytes(data))
