"""Image files that are dear to decode, each as dear as the default limits allow: up to 16 MiB and 64 megapixels.

They are whole images, or nearly: what is not worth decoding is in `soak.fuzz_images`.
"""

import io
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from PIL import Image

from schemas.settings import LimitSettings

MAX_BYTES = LimitSettings().max_image_bytes
_SIDE_PX = int(LimitSettings().max_pixels ** 0.5)


def dear_images() -> Iterator[tuple[str, bytes]]:
    """Make each file, with its kind: of so many pixels as fit into an entry, or as may be."""
    Image.MAX_IMAGE_PIXELS = None
    for kind, side_px, make in _KINDS:
        data = make(side_px)
        assert len(data) <= MAX_BYTES, kind
        yield f"{kind}, {side_px} px", data


def _encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def _plain(side_px: int, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (side_px, side_px), (90, 120, 30)).convert(mode)


def _noise(side_px: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _texture(side_px: int) -> Image.Image:
    """Repeat a noisy tile, which compresses, and is decoded value by value."""
    tile = np.asarray(_noise(100))
    times = -(-side_px // 100)
    return Image.fromarray(np.tile(tile, (times, times, 1))[:side_px, :side_px])


def _stripes(side_px: int) -> Image.Image:
    """Draw black and white columns of one pixel each."""
    return Image.fromarray(np.tile(np.array([0, 255], np.uint8), (side_px, side_px // 2))).convert("1")


def _jpeg_of_scans(image: Image.Image, scans: int) -> bytes:
    """Write a progressive JPEG and repeat its last scan until it has so many."""
    data = _encoded(image, "JPEG", progressive=True, quality=50)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def _png16(side_px: int) -> bytes:
    pixels = np.full((side_px, side_px, 3), 9999, np.uint16)
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _tiff16(side_px: int) -> bytes:
    pixels = np.full((side_px, side_px, 3), 9999, np.uint16)
    return cv2.imencode(".tiff", pixels, [cv2.IMWRITE_TIFF_COMPRESSION, 8])[1].tobytes()


def _tiff(make: Callable[[int], Image.Image], compression: str, **options: object) -> Callable[[int], bytes]:
    return lambda side_px: _encoded(make(side_px), "TIFF", compression=compression, **options)


_KINDS: tuple[tuple[str, int, Callable[[int], bytes]], ...] = (
    ("jpeg, plain", _SIDE_PX, lambda side: _encoded(_plain(side), "JPEG")),
    ("jpeg, noise", 3_442, lambda side: _encoded(_noise(side), "JPEG", quality=95)),
    ("jpeg, texture, full colour", _SIDE_PX, lambda side: _encoded(_texture(side), "JPEG", quality=10, subsampling=0)),
    ("jpeg, progressive noise", 3_825, lambda side: _encoded(_noise(side), "JPEG", progressive=True, quality=95)),
    ("jpeg, 20 scans", _SIDE_PX, lambda side: _jpeg_of_scans(_plain(side), 20)),
    ("jpeg, 20 scans of texture", 2_787, lambda side: _jpeg_of_scans(_texture(side), 20)),
    ("jpeg, 1,000 scans", 1_100, lambda side: _jpeg_of_scans(_plain(side), 1_000)),
    ("jpeg, 1,000 scans of noise", 300, lambda side: _jpeg_of_scans(_noise(side), 1_000)),
    ("png, plain", _SIDE_PX, lambda side: _encoded(_plain(side), "PNG", compress_level=1)),
    ("png, texture", _SIDE_PX, lambda side: _encoded(_texture(side), "PNG", compress_level=1)),
    ("png, noise", 2_257, lambda side: _encoded(_noise(side), "PNG", compress_level=1)),
    ("png, grey", _SIDE_PX, lambda side: _encoded(_plain(side, "L"), "PNG", compress_level=1)),
    ("png, palette", 7_200, lambda side: _encoded(_plain(side, "P"), "PNG", compress_level=1)),
    ("png, alpha", int(_SIDE_PX * 0.86), lambda side: _encoded(_plain(side, "RGBA"), "PNG", compress_level=1)),
    ("png, 16 bits", int(_SIDE_PX * 0.7), _png16),
    ("webp, plain", _SIDE_PX, lambda side: _encoded(_plain(side), "WEBP", method=0)),
    ("webp, noise", 5_248, lambda side: _encoded(_noise(side), "WEBP", method=0, quality=60)),
    ("webp, lossless plain", _SIDE_PX, lambda side: _encoded(_plain(side), "WEBP", lossless=True, method=0)),
    ("webp, lossless texture", _SIDE_PX, lambda side: _encoded(_texture(side), "WEBP", lossless=True, method=0)),
    ("webp, lossless noise", 2_257, lambda side: _encoded(_noise(side), "WEBP", lossless=True, method=0)),
    ("bmp, noise", 2_257, lambda side: _encoded(_noise(side), "BMP")),
    ("bmp, one bit", _SIDE_PX, lambda side: _encoded(_plain(side, "1"), "BMP")),
    ("tiff, stripes as a fax page", _SIDE_PX, _tiff(_stripes, "group4")),
    ("tiff, packed bits", 2_257, _tiff(_plain, "packbits")),
    ("tiff, lzw", _SIDE_PX, _tiff(_plain, "tiff_lzw")),
    ("tiff, lzw texture", 3_825, _tiff(_texture, "tiff_lzw")),
    ("tiff, lzw noise", 1_827, _tiff(_noise, "tiff_lzw")),
    ("tiff, deflate", _SIDE_PX, _tiff(_plain, "tiff_adobe_deflate")),
    ("tiff, deflate texture", _SIDE_PX, _tiff(_texture, "tiff_adobe_deflate")),
    ("tiff, jpeg", 5_832, _tiff(_texture, "jpeg", quality=10)),
    ("tiff, noise", 2_257, _tiff(_noise, "raw")),
    ("tiff, palette", 5_000, _tiff(lambda side: _plain(side, "P"), "tiff_lzw")),
    ("tiff, CMYK", int(_SIDE_PX * 0.86), _tiff(lambda side: _plain(side, "CMYK"), "tiff_lzw")),
    ("tiff, 16 bits", int(_SIDE_PX * 0.7), _tiff16),
)
