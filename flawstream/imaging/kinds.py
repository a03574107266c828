"""What bytes are that are no image we read, by how they begin: for the text of a refusal. Decodes nothing."""

import re
from collections.abc import Callable

_BEGIN = 64
_BASE64_IMAGES = (b"/9j/", b"iVBORw0KGgo", b"UklGR", b"Qk", b"SUkq", b"TU0A")
"""JPEG, PNG, WebP, BMP, and TIFF in both byte orders."""
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]{16,}=*\s*")
_BRANDS = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"hevc": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"crx ": "a camera's RAW (CR3)",
}
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"GIF8", "a GIF"),
    (b"%PDF", "a PDF"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"FUJIFILMCCD-RAW", "a camera's RAW (RAF)"),
    (b"IIRO", "a camera's RAW (ORF)"),
    (b"IIU\x00", "a camera's RAW (RW2)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"8BPS", "a Photoshop file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"\x89HDF", "HDF5"),
)
_TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "SVG"),
    (b"<!doctype html", "HTML, as of an error page"),
    (b"<html", "HTML, as of an error page"),
    (b"<", "XML"),
    (b"{", "JSON"),
    (b"[", "JSON"),
)
_TIFFS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_CURE = "send a JPEG, PNG, WebP, BMP or TIFF"
_UNKNOWN_CURE = f"{_CURE}; pixels as a camera gives them must be encoded first"
_JPEG = b"\xff\xd8\xff"
_TIFF_CURE = "save it with 8 or 16 bits, with LZW, Deflate or no compression"


def describe(data: bytes) -> str:
    """Name what bytes are, and what to do."""
    kind, cure = _kind_and_cure(data)
    return f"{len(data):,} bytes that start with {data[:8].hex(' ')} are {kind}; {cure}" if data else f"{kind}; {cure}"


def _kind_and_cure(data: bytes) -> tuple[str, str]:
    for names, kind, cure in _TESTS:
        if names(data):
            return kind, cure
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "a video or an image in an MP4 container"), _CURE
    begin = data[:_BEGIN].lstrip().lower()
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind, _CURE
    for signature, kind in _TEXTS:
        if begin.startswith(signature):
            return kind, _CURE
    return ("text", f"{_CURE}, not its name") if _is_text(begin) else ("bytes of no image that is read", _UNKNOWN_CURE)


def _is_base64(data: bytes) -> bool:
    begin = data[:_BEGIN].lstrip()
    return data.startswith(b"data:") or (begin.startswith(_BASE64_IMAGES) and _BASE64.fullmatch(begin) is not None)


def _is_text(begin: bytes) -> bool:
    return begin.isascii() and begin.decode("ascii").replace("\t", "").replace("\r", "").replace("\n", "").isprintable()


_TESTS: tuple[tuple[Callable[[bytes], object], str, str], ...] = (
    (lambda data: not data, "the image is empty", "send its bytes"),
    (lambda data: not any(data[:_BEGIN]), "zeros", "send the image when it has been written to its end"),
    (lambda data: data.startswith(_TIFFS), "a TIFF that is not read: floats, 32 bits or its compression", _TIFF_CURE),
    (lambda data: data.startswith(b"RIFF"), "a RIFF file that is no WebP, as AVI or WAV", _CURE),
    (lambda data: re.match(rb"P[1-7]\s", data), "a PNM (PGM, PPM)", _CURE),
    (_is_base64, "an image in base64", "decode it first, and send the bytes that it stands for"),
    (lambda data: _JPEG in data[1:_BEGIN], "a JPEG behind other bytes", "cut those off"),
    (lambda data: re.match(rb"https?://", data), "a URL", "send it in image_ref"),
)
