"""Damaged and hostile image files for the fuzz: small photographs of every format, spoilt, and bombs made by hand.

Whether a spoilt image can still be read is asked of Pillow, which decodes none of what flawstream decodes.
"""

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from schemas.errors import Reason

FORMATS = ("jpeg", "png", "webp", "bmp", "tiff")

_MAX_PIXELS = 64_000_000
"""`limits.max_pixels`, as the fuzz leaves it."""
_UNDECODABLE = frozenset({Reason.UNDECODABLE})
_TOO_LARGE = frozenset({Reason.TOO_LARGE})
_EITHER = _UNDECODABLE | _TOO_LARGE
_VARIANTS: dict[str, tuple[dict[str, object], ...]] = {
    "jpeg": ({"quality": 85}, {"quality": 60, "progressive": True}, {"quality": 95, "subsampling": 0}),
    "png": ({}, {"compress_level": 0}, {"optimize": True}),
    "webp": ({"quality": 80}, {"lossless": True}),
    "bmp": ({},),
    "tiff": ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "jpeg"}),
}


@dataclass(frozen=True, slots=True)
class SpoiltImage:
    """A file that is to be refused.

    Attributes:
        kind: What was done, and to which format.
        data: The file.
        reasons: Any of these is right.
        readable: Pillow reads it all the same: a result is right too.
    """

    kind: str
    data: bytes
    reasons: frozenset[Reason]
    readable: bool = False


def photograph(chance: random.Random, kind: str) -> bytes:
    """Take a small picture: a lit surface with grain, in one of the ways that a format has to store it."""
    height, width = chance.randint(24, 96), chance.randint(24, 96)
    noise = np.random.default_rng(chance.getrandbits(32))
    light = np.add.outer(np.linspace(40, 120, height), np.linspace(0, 90, width))
    pixels = np.clip(light[..., None] + noise.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    pixels = cv2.GaussianBlur(pixels, (3, 3), 0)
    image = Image.fromarray(pixels if chance.random() < 0.8 else pixels[..., 0])
    file = io.BytesIO()
    image.save(file, kind.upper(), **chance.choice(_VARIANTS[kind]))
    return file.getvalue()


def spoil(chance: random.Random) -> SpoiltImage:
    """Take a picture and damage its file."""
    kind = chance.choice(FORMATS)
    data = bytearray(photograph(chance, kind))
    how = chance.choice(("truncated", "bits flipped", "bytes overwritten", "bytes removed", "two files spliced"))
    at = chance.randrange(len(data))
    match how:
        case "truncated":
            del data[max(at, 1) :]
        case "bits flipped":
            for _ in range(2 ** chance.randint(0, 6)):
                # half of the flips in the header, which is where a decoder believes what it reads
                data[chance.randrange(min(len(data), chance.choice((64, len(data)))))] ^= 1 << chance.randrange(8)
        case "bytes overwritten":
            data[at : at + 64] = chance.choice((b"\x00", b"\xff", chance.randbytes(1))) * len(data[at : at + 64])
        case "bytes removed":
            del data[at : at + chance.randint(1, 64)]
        case _:
            data[at:] = photograph(chance, chance.choice(FORMATS))[at:]
    reasons = _UNDECODABLE if how == "truncated" else _EITHER  # other damage may hit the size that the header tells
    return SpoiltImage(f"{kind}, {how}", bytes(data), reasons, is_readable(bytes(data)))


def oblong(chance: random.Random) -> SpoiltImage:
    """Draw a whole image that is too long for its width."""
    kind, long = chance.choice(FORMATS), chance.randint(200, 900)
    file = io.BytesIO()
    Image.new("RGB", chance.choice(((long, 2), (2, long)))).save(file, kind.upper())
    return SpoiltImage(f"{kind}, too long", file.getvalue(), _TOO_LARGE)


def foreign(chance: random.Random) -> SpoiltImage:
    """Write what is whole, and none of the five formats."""
    kind = chance.choice(("gif", "ppm", "ico", "pcx", "sgi"))
    file = io.BytesIO()
    Image.new("RGB", (chance.randint(16, 64), chance.randint(16, 64)), chance.choice(("red", "grey"))).save(
        file, kind.upper()
    )
    return SpoiltImage(f"another format, {kind}", file.getvalue(), _UNDECODABLE)


def bomb(chance: random.Random) -> SpoiltImage:
    """Make a small file that claims to be something huge, or would unpack to it."""
    name, make = chance.choice(_BOMBS)
    data, reasons = make(chance)
    # Pillow fills in what is missing of a JPEG. All others have no picture at all.
    return SpoiltImage(name, data, reasons, readable=name.startswith("jpeg") and is_readable(data))


def is_readable(data: bytes) -> bool:
    """Tell whether Pillow decodes every pixel of a file, and few enough."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=[kind.upper() for kind in FORMATS]) as image:
                if image.width * image.height > _MAX_PIXELS:
                    return False
                image.load()
                return True
    except Exception:  # noqa: BLE001 - it raises anything
        return False


_Bomb = Callable[[random.Random], tuple[bytes, frozenset[Reason]]]


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def _png_size(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    side = chance.randint(8_001, 2**31 - 1)
    return _png(side, side, (b"IDAT", zlib.compress(bytes(64)))), _TOO_LARGE


def _png_within_limits(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    return _png(chance.randint(3_000, 7_900), 7_900, (b"IDAT", zlib.compress(bytes(1 << 16)))), _UNDECODABLE


def _png_text(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    text = b"Comment\x00\x00" + zlib.compress(bytes(chance.randint(2, 16) << 20))
    return _png(8, 8, (b"zTXt", text), (b"IDAT", zlib.compress(bytes(8)))), _UNDECODABLE


def _png_length(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    whole = bytearray(_png(8, 8, (b"tEXt", b"Comment\x00x"), (b"IDAT", zlib.compress(bytes(200)))))
    whole[33:37] = struct.pack(">I", chance.randint(1 << 16, 2**31 - 1))  # the text's length
    return bytes(whole), _UNDECODABLE


def _png_chunks(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    return _png(8, 8, *[(b"teXt", b"")] * chance.randint(66_000, 80_000)), _UNDECODABLE


def _jpeg_size(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    data = bytearray(photograph(chance, "jpeg"))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    height, width = chance.randint(8_001, 65_500), chance.randint(8_001, 65_500)
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data), _TOO_LARGE


def _jpeg_within_limits(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    data = bytearray(photograph(chance, "jpeg"))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    data[frame + 5 : frame + 9] = struct.pack(">HH", chance.randint(1_000, 3_000), chance.randint(1_000, 3_000))
    return bytes(data), _UNDECODABLE


def _jpeg_scans(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    """Repeat the last scan of a progressive JPEG: a decoder goes over all coefficients for each."""
    file = io.BytesIO()
    Image.new("RGB", (512, 512)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * chance.randint(1_100, 4_000) + data[-2:], _UNDECODABLE


def _jpeg_segments(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    return b"\xff\xd8" + b"\xff\xfe\x00\x02" * chance.randint(5_000, 200_000) + photograph(chance, "jpeg")[
        2:
    ], _UNDECODABLE


def _webp_size(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    width, height = chance.randint(8_001, 1 << 15), chance.randint(8_001, 1 << 15)
    canvas = b"\x10\x00\x00\x00" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(canvas)) + canvas + photograph(chance, "webp")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body, _EITHER


def _bmp(width: int, height: int, bits: int, compression: int, pixels: bytes) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + info + pixels


def _bmp_size(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    side = chance.randint(8_001, 2**31 - 1)
    return _bmp(side, chance.choice((side, -side)), 24, 0, bytes(64)), _EITHER


def _bmp_within_limits(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    return _bmp(chance.randint(3_000, 7_900), 7_900, chance.choice((24, 32)), 0, bytes(64)), _UNDECODABLE


def _bmp_runs(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    return _bmp(7_900, 7_900, 8, 1, chance.randbytes(chance.randint(64, 4096))), _UNDECODABLE


def _tiff(*entries: tuple[int, int, int, int], following: int = 0, tail: bytes = b"") -> bytes:
    """Write one directory of (tag, type, count, value), each value in its place, and where the next directory is."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following) + tail


def _tiff_entries(width: int, height: int, *, strip_bytes: int, strips: int = 1) -> list[tuple[int, int, int, int]]:
    return [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, strips, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, strips, strip_bytes),
    ]


def _tiff_size(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    side = chance.randint(8_001, 2**32 - 1)
    return _tiff(*_tiff_entries(side, side, strip_bytes=64), tail=bytes(64)), _EITHER


def _tiff_strips(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    strip_bytes, strips = chance.randint(1 << 20, 2**32 - 1), chance.randint(1, 2**32 - 1)
    return _tiff(*_tiff_entries(4_000, 4_000, strip_bytes=strip_bytes, strips=strips), tail=bytes(64)), _EITHER


def _tiff_directory(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    return b"II*\x00" + struct.pack("<IH", chance.choice((8, 0, 2**32 - 1)), 65_535) + chance.randbytes(600), _EITHER


def _tiff_counts(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    entries = [
        (chance.randint(254, 340), chance.randint(0, 20), 2**32 - 1 - k, chance.getrandbits(32)) for k in range(40)
    ]
    return _tiff(*entries), _EITHER


def _tiff_tile(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    """Claim a tile that is many times as large as the image."""
    tile = 16 * chance.randint(600, 4_000)
    entries = [entry for entry in _tiff_entries(64, 64, strip_bytes=64) if entry[0] not in (273, 278, 279)]
    tiles = [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 8), (325, 4, 1, 64)]
    return _tiff(*entries, *tiles, tail=bytes(64)), _EITHER


def _tiff_pages(chance: random.Random) -> tuple[bytes, frozenset[Reason]]:
    """Chain pages without end: each directory says that the next one is itself."""
    entries = _tiff_entries(chance.randint(1_000, 7_000), 7_000, strip_bytes=16)
    return _tiff(*entries, following=8, tail=bytes(16)), _EITHER


_BOMBS: tuple[tuple[str, _Bomb], ...] = (
    ("png bomb, size", _png_size),
    ("png bomb, within limits", _png_within_limits),
    ("png bomb, packed text", _png_text),
    ("png bomb, chunk length", _png_length),
    ("png bomb, chunks", _png_chunks),
    ("jpeg bomb, size", _jpeg_size),
    ("jpeg bomb, within limits", _jpeg_within_limits),
    ("jpeg bomb, scans", _jpeg_scans),
    ("jpeg bomb, segments", _jpeg_segments),
    ("webp bomb, size", _webp_size),
    ("bmp bomb, size", _bmp_size),
    ("bmp bomb, within limits", _bmp_within_limits),
    ("bmp bomb, run lengths", _bmp_runs),
    ("tiff bomb, size", _tiff_size),
    ("tiff bomb, strips", _tiff_strips),
    ("tiff bomb, tile", _tiff_tile),
    ("tiff bomb, directory", _tiff_directory),
    ("tiff bomb, counts", _tiff_counts),
    ("tiff bomb, pages", _tiff_pages),
)
