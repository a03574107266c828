"""The one way from compressed bytes to pixels, in training and in serving, so that both see the same image.

Everything is hostile until parsed: format, size and aspect are read from the header and limited before anything is
decoded. Knows no model and no transport.
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

from flawstream.imaging.pixels import PixelForm, Pixels
from flawstream.imaging.png import check_chunks
from flawstream.imaging.resize import resize
from schemas.errors import MessageError, Reason
from schemas.settings import LimitSettings

logging.getLogger("PIL").setLevel(logging.INFO)  # at DEBUG it logs what stands in an image's tags

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_CURE = "send a JPEG, PNG, WebP, BMP or TIFF"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BMP_RUN_LENGTHS = (1, 2)  # BI_RLE8, BI_RLE4: 1 KB takes OpenCV 4 s to turn into 62 million pixels
_ORIENTATION = 0x0112  # EXIF 2.3, section 4.6.4

# A damaged image becomes an error here; OpenCV would print each on stderr as well.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image as the model sees it.

    Attributes:
        pixels: (S, S, 3) RGB, upright, S and the dtype those of the form asked for.
        original_shape: (height, width) in pixels before resizing, upright.
    """

    pixels: Pixels
    original_shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Header:
    """What an image says of itself before it is decoded.

    Attributes:
        format: Pillow's name.
        width: Pixels, as stored.
        height: Pixels, as stored.
        orientation: EXIF's, 1 (upright) to 8; always 1 but for JPEG, as OpenCV sees to the others.
    """

    format: str
    width: int
    height: int
    orientation: int = 1


def decode_image(data: bytes, form: PixelForm, limits: LimitSettings) -> DecodedImage:
    """Decode an image and resize it to a square, stretching where it is not one.

    Grey images become three equal channels, alpha is dropped (in TIFF libtiff blends it with black), 16 bits are
    scaled to 8, and an image whose EXIF data say that the camera was turned is turned upright.

    Args:
        data: JPEG, PNG, WebP, BMP or TIFF bytes.
        form: What to resize it to.
        limits: What is too large to be decoded.

    Raises:
        MessageError: `undecodable` or `too_large`.
    """
    header = _read_header(data)
    _refuse_oversized(header.width, header.height, limits)
    try:
        if header.format == "JPEG":
            return _decode_jpeg(data, form, header)
        if header.format == "WEBP":  # OpenCV reads on behind the end of the container, and finds a picture in anything
            data = data[: 8 + int.from_bytes(data[4:8], "little")]
        elif header.format == "TIFF":
            _refuse_damaged_tiff(data)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (ValueError, OSError, cv2.error) as error:
        raise MessageError(Reason.UNDECODABLE, f"the {header.format} is damaged ({_short(error)}); {_CURE}") from None
    if pixels is None:
        raise MessageError(Reason.UNDECODABLE, f"the {header.format} is damaged or of an unusual kind; {_CURE}")
    return DecodedImage(resize(pixels, form), (pixels.shape[0], pixels.shape[1]))


def _decode_jpeg(data: bytes, form: PixelForm, header: _Header) -> DecodedImage:
    """Decode at the smallest scale that is large enough, and turn what is left, which is cheap."""
    least = form.side_px if form.resize == "area" else 0  # decoding at a smaller scale is a filter of its own
    pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=least, min_width=least, min_factor=1)
    shape = (header.width, header.height) if header.orientation in _ON_ITS_SIDE else (header.height, header.width)
    return DecodedImage(_turn(resize(pixels, form), header.orientation), shape)


def _read_header(data: bytes) -> _Header:
    """Read format, size and orientation without decoding a pixel."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that our own limits refuse
            if data.startswith(_PNG_SIGNATURE):
                check_chunks(data)  # first: Pillow takes a second for tens of thousands of them
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.info.get("compression") in _BMP_RUN_LENGTHS:
                    raise ValueError("a BMP coded in run lengths")  # noqa: TRY301 - told as a damaged header is
                if image.format in ("JPEG", "MPO"):  # MPO: a JPEG with more pictures behind the first
                    return _Header("JPEG", image.width, image.height, _orientation(image.info.get("exif")))
                return _Header(str(image.format), image.width, image.height)
    except UnidentifiedImageError:
        raise MessageError(
            Reason.UNDECODABLE,
            f"{len(data):,} bytes that start with {data[:8].hex(' ')} are no image known here; {_CURE}",
        ) from None
    except Image.DecompressionBombError as error:
        raise MessageError(Reason.TOO_LARGE, f"{_short(error)}; send a smaller image") from None
    except Exception as error:  # noqa: BLE001 - Pillow's parsers raise anything on hostile headers
        raise MessageError(Reason.UNDECODABLE, f"the image's header is damaged ({_short(error)}); {_CURE}") from None


def _refuse_damaged_tiff(data: bytes) -> None:
    """Refuse a TIFF with a damaged strip: OpenCV gives a picture with a hole, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            try:
                image.load()
            except Exception as error:  # noqa: BLE001 - it raises anything
                raise ValueError(_short(error)) from None


def _orientation(exif_data: bytes | None) -> int:
    if not exif_data:
        return 1
    exif = Image.Exif()
    try:
        exif.load(exif_data)
        orientation = exif.get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - the same; an image with damaged EXIF data is shown as it lies, as OpenCV does
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
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    return np.ascontiguousarray(_TURNS[orientation](pixels))


def _refuse_oversized(width: int, height: int, limits: LimitSettings) -> None:
    if width * height > limits.max_pixels:
        raise MessageError(
            Reason.TOO_LARGE,
            f"{width} x {height} pixels are {width * height:,} and {limits.max_pixels:,} are allowed; "
            "send a smaller image or raise limits.max_pixels",
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise MessageError(
            Reason.TOO_LARGE,
            f"{width} x {height} pixels are longer than {limits.max_aspect:g} to 1; "
            "cut the image or raise limits.max_aspect",
        )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
