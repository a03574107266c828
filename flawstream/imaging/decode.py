"""Decoding of compressed images to pixels, used by training and serving, so that both see the same image.

Input is untrusted: format, size and aspect ratio are read from the header and checked before anything is decoded.
Knows no model and no transport.
"""

import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from flawstream.imaging.jpeg import JpegHeader, read_jpeg_header
from flawstream.imaging.jpeg_strays import refuse_cut_intervals, without_gaps
from flawstream.imaging.kinds import describe
from flawstream.imaging.levels import Levels, to_eight_bits
from flawstream.imaging.memory import DecodingMemory
from flawstream.imaging.pixels import PixelForm, Pixels
from flawstream.imaging.png import PngHeader, read_png_header, without_damaged_texts
from flawstream.imaging.resize import resize
from flawstream.imaging.tiff import read_tiff_layout
from schemas.errors import MessageError, Reason, one_line
from schemas.settings import BitDepth, LimitSettings

Image.MAX_IMAGE_PIXELS = None  # `LimitSettings.max_pixels` is checked before anything is decoded
logging.getLogger("PIL").setLevel(logging.INFO)  # at DEBUG it logs an image's tags

_FORMATS = ("WEBP", "BMP", "TIFF")
_CURE = "send a JPEG, PNG, WebP, BMP or TIFF"
_JPEG_SIGNATURE, _PNG_SIGNATURE = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_STORED_BYTES_A_PIXEL = 3
"""What may be stored for each pixel of the largest image: eight bits of three channels."""
_MOST_PASSES = 20
"""What a decoder may go over pixels in all, in largest images. libjpeg's own progressive files have ten scans."""
_BYTES_A_PIXEL = 6  # two copies in three channels: measured for OpenCV's decoders
_BMP_RUN_LENGTHS = (1, 2)  # BI_RLE8, BI_RLE4: OpenCV decodes 1 KB in 4 s, to 62 million pixels
_ORIENTATION = 0x0112  # EXIF 2.3, section 4.6.4

_MOST_DETAIL = 160
"""Characters of a library's own words in an error."""
_MEMORY = DecodingMemory()
_ANY_FORM = PixelForm(32)

# A damaged image raises an error; OpenCV would print it on stderr as well.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image as the model sees it.

    Attributes:
        pixels: (S, S, 3) RGB, upright; S and dtype as the `PixelForm` says.
        original_shape: (height, width) in pixels before resizing, upright.
        levels: Of a file with 16 bits; None with 8.
    """

    pixels: Pixels
    original_shape: tuple[int, int]
    levels: Levels | None = None

    @property
    def depth(self) -> BitDepth | None:
        """By how many bits it was read, if its file has 16."""
        return self.levels.bits if self.levels else None


@dataclass(frozen=True, slots=True)
class _Header:
    """The header of an image.

    Attributes:
        format: Pillow's name of the format.
        width: Pixels, as stored.
        height: Pixels, as stored.
        unpacked_bytes: Of the pixels as stored, before they are converted.
        passes: How often a decoder goes over all pixels.
        wide: Whether a sample has 16 bits.
        white_is_zero: Whether the lowest level of a TIFF is white.
        grey: Whether one of 16 bits has a single channel: it takes a third of the memory.
        jpeg: What a JPEG says of itself.
        png: What a PNG says of itself.
    """

    format: str
    width: int
    height: int
    unpacked_bytes: int
    passes: int = 1
    wide: bool = False
    white_is_zero: bool = False
    grey: bool = False
    jpeg: JpegHeader | None = None
    png: PngHeader | None = None

    def decoding_bytes(self, form: PixelForm) -> int:
        """Estimate the memory that decoding takes."""
        pixels = self.width * self.height
        if self.format == "JPEG" and form.resize == "area":  # decoded at a smaller scale, down to an eighth
            scale = min(1.0, max(1 / 8, 2 * form.side_px / max(1, min(self.width, self.height))))
            pixels = int(pixels * scale**2)
        return self.unpacked_bytes + _BYTES_A_PIXEL * pixels


def decode_image(data: bytes, form: PixelForm, limits: LimitSettings) -> DecodedImage:
    """Decode an image and resize it to a square, stretching it if it is not square.

    Grey images get three equal channels, alpha is dropped (for TIFF of 8 bits, libtiff blends it with black), eight are
    kept of 16 bits, and the EXIF orientation is applied.

    Args:
        data: JPEG, PNG, WebP, BMP or TIFF bytes.
        form: Size and filter to resize to, and how many of 16 bits are filled.
        limits: Maximum size and aspect ratio.

    Raises:
        MessageError: `undecodable` or `too_large`.
    """
    header = _read_header(data)
    _refuse_oversized(header, limits)
    with _MEMORY.take(header.decoding_bytes(form), limits.max_decoding_bytes):
        return _decode(data, form, header)


def read_levels(data: bytes, limits: LimitSettings) -> Levels | None:
    """Read the grey levels of a file; None if it has 8 bits, and so is not decoded.

    Args:
        data: The file.
        limits: Maximum size and aspect ratio.

    Raises:
        MessageError: `undecodable` or `too_large`.
    """
    return decode_image(data, _ANY_FORM, limits).levels if _read_header(data).wide else None


def _decode(data: bytes, form: PixelForm, header: _Header) -> DecodedImage:
    try:
        if header.format == "JPEG":
            return _decode_jpeg(data, form, header)
        if header.format == "WEBP":  # OpenCV reads past the end of the container, and decodes any bytes there
            data = data[: 8 + int.from_bytes(data[4:8], "little")]
        if header.png is not None:
            data = without_damaged_texts(data, header.png)
        if header.wide:
            return _decode_wide(data, form, header)
        if header.format == "TIFF":
            _refuse_damaged_tiff(data)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (ValueError, OSError, cv2.error) as error:
        raise MessageError(
            Reason.UNDECODABLE, f"the {header.format} is damaged ({one_line(error, _MOST_DETAIL)}); {_CURE}"
        ) from None
    if pixels is None:
        raise MessageError(Reason.UNDECODABLE, f"the {header.format} is damaged or of an unsupported kind; {_CURE}")
    return DecodedImage(resize(pixels, form), (pixels.shape[0], pixels.shape[1]))


def _decode_jpeg(data: bytes, form: PixelForm, header: _Header) -> DecodedImage:
    """Decode at the smallest scale that is large enough; apply the orientation after resizing, which is faster."""
    jpeg = header.jpeg
    assert jpeg is not None  # noqa: S101 - read from the same data
    if jpeg.gaps:
        data = without_gaps(data, jpeg)
        jpeg = read_jpeg_header(data)
    min_side = form.side_px if form.resize == "area" else 0  # 0: full scale, as scaled decoding is another filter
    height, width, _, _ = simplejpeg.decode_jpeg_header(data, min_side, min_side, 1)
    pixels = np.empty((int(height), int(width), 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            data, colorspace="RGB", min_height=min_side, min_width=min_side, min_factor=1, buffer=pixels
        )
    except ValueError as error:  # all is decoded, and this is the decoder's first warning
        refuse_cut_intervals(data, jpeg, str(error))
    orientation = _orientation(jpeg.exif)
    shape = (jpeg.width, jpeg.height) if orientation in _TRANSPOSED else (jpeg.height, jpeg.width)
    return DecodedImage(_orient(resize(pixels, form), orientation), shape)


def _read_header(data: bytes) -> _Header:
    """Read format, size and depth without decoding a pixel."""
    try:
        if data.startswith(_JPEG_SIGNATURE):
            return _read_jpeg_header(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that our own limits refuse
            if data.startswith(_PNG_SIGNATURE):
                return _read_png_header(data)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                pixels = image.width * image.height
                if image.info.get("compression") in _BMP_RUN_LENGTHS:
                    raise ValueError("a run-length encoded BMP")  # noqa: TRY301 - reported as a damaged header
                if image.format == "TIFF":
                    layout = read_tiff_layout(image, data)
                    return _Header(
                        "TIFF",
                        image.width,
                        image.height,
                        layout.unpacked_bytes,
                        layout.passes,
                        wide=layout.wide,
                        white_is_zero=layout.white_is_zero,
                        grey=layout.grey,
                    )
                return _Header(str(image.format), image.width, image.height, len(image.getbands()) * pixels)
    except UnidentifiedImageError:
        raise MessageError(Reason.UNDECODABLE, describe(data)) from None
    except Exception as error:  # noqa: BLE001 - Pillow raises any exception on damaged headers
        raise MessageError(
            Reason.UNDECODABLE, f"the image's header is damaged ({one_line(error, _MOST_DETAIL)}); {_CURE}"
        ) from None


def _read_png_header(data: bytes) -> _Header:
    header = read_png_header(data)
    size = header.width, header.height
    return _Header("PNG", *size, header.unpacked_bytes, wide=header.wide, grey=header.grey, png=header)


def _read_jpeg_header(data: bytes) -> _Header:
    header = read_jpeg_header(data)
    coefficients = 0 if header.scan else 2 * header.components * header.width * header.height
    return _Header("JPEG", header.width, header.height, coefficients, header.passes, jpeg=header)


def _decode_wide(data: bytes, form: PixelForm, header: _Header) -> DecodedImage:
    """Decode samples of 16 bits. OpenCV reports a damaged strip of such a TIFF; as RGB it would give garbage."""
    channels = cv2.IMREAD_GRAYSCALE if header.grey else cv2.IMREAD_COLOR_BGR
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), channels | cv2.IMREAD_ANYDEPTH)
    if stored is None:
        raise ValueError("it cannot be decoded")
    bgr, levels = to_eight_bits(stored, form.bits, white_is_zero=header.white_is_zero)
    return DecodedImage(np.ascontiguousarray(resize(bgr, form)[:, :, ::-1]), (bgr.shape[0], bgr.shape[1]), levels)


def _refuse_damaged_tiff(data: bytes) -> None:
    """Refuse a TIFF with a damaged strip, which OpenCV decodes without an error, leaving a hole, if it has 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            try:
                image.load()
            except Exception as error:  # noqa: BLE001 - Pillow raises any exception
                raise ValueError(one_line(error, _MOST_DETAIL)) from None


def _orientation(exif_data: bytes) -> int:
    if not exif_data:
        return 1
    exif = Image.Exif()
    try:
        exif.load(exif_data)
        orientation = exif.get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - the same; with damaged EXIF data the image is not turned, as in OpenCV
        return 1
    return orientation if orientation in _TURNS else 1


_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
_TRANSPOSED = frozenset({5, 6, 7, 8})


def _orient(pixels: Pixels, orientation: int) -> Pixels:
    return np.ascontiguousarray(_TURNS[orientation](pixels))


def _refuse_oversized(header: _Header, limits: LimitSettings) -> None:
    width, height = header.width, header.height
    pixels = width * height
    if pixels > limits.max_pixels:
        raise MessageError(
            Reason.TOO_LARGE,
            f"{width} x {height} = {pixels:,} pixels are more than the allowed {limits.max_pixels:,}; "
            "send a smaller image or raise limits.max_pixels",
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise MessageError(
            Reason.TOO_LARGE,
            f"the aspect ratio of {width} x {height} pixels is over {limits.max_aspect:g} to 1; "
            "crop the image or raise limits.max_aspect",
        )
    if header.format != "JPEG" and header.unpacked_bytes > _STORED_BYTES_A_PIXEL * limits.max_pixels:
        raise MessageError(
            Reason.TOO_LARGE,
            f"the {header.format} unpacks to {header.unpacked_bytes:,} bytes, more than {_STORED_BYTES_A_PIXEL} for "
            f"each of the allowed {limits.max_pixels:,} pixels; send fewer pixels, bits or channels, or raise "
            "limits.max_pixels",
        )
    if header.passes * pixels > _MOST_PASSES * limits.max_pixels:
        raise MessageError(
            Reason.TOO_LARGE,
            f"the {header.format} has {header.passes:,} scans of {width} x {height} pixels, more than {_MOST_PASSES} "
            f"of the allowed {limits.max_pixels:,} pixels; send a baseline JPEG",
        )
