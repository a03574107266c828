"""The one way from compressed bytes to pixels, in training and in serving, so that both see the same image.

Everything is hostile until parsed: format, size and aspect are read from the header and limited before anything is
decoded. Knows no model and no transport.
"""

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from schemas.errors import MessageError, Reason
from schemas.settings import LimitSettings

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_CURE = "send a JPEG, PNG, WebP, BMP or TIFF"


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image as the model sees it.

    Attributes:
        pixels: (size, size, 3) uint8 RGB.
        original_shape: (height, width) in pixels before resizing.
    """

    pixels: NDArray[np.uint8]
    original_shape: tuple[int, int]


def decode_image(data: bytes, size: int, limits: LimitSettings) -> DecodedImage:
    """Decode an image and resize it to a square, stretching where it is not one.

    Grey images become three equal channels, alpha is dropped, 16 bits are scaled to 8.

    Args:
        data: JPEG, PNG, WebP, BMP or TIFF bytes.
        size: Side of the result in pixels.
        limits: What is too large to be decoded.

    Raises:
        MessageError: `undecodable` or `too_large`.
    """
    image_format, width, height = _read_header(data)
    _refuse_oversized(width, height, limits)
    try:
        if image_format == "JPEG":
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=size, min_width=size, min_factor=1)
        else:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (ValueError, cv2.error) as error:
        raise MessageError(Reason.UNDECODABLE, f"the {image_format} is damaged ({_short(error)}); {_CURE}") from None
    if pixels is None:
        raise MessageError(Reason.UNDECODABLE, f"the {image_format} is damaged or of an unusual kind; {_CURE}")
    return DecodedImage(_resize(pixels, size), (height, width))


def _read_header(data: bytes) -> tuple[str, int, int]:
    """Read format, width and height without decoding a pixel."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that our own limits refuse
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return str(image.format), image.width, image.height
    except UnidentifiedImageError:
        raise MessageError(
            Reason.UNDECODABLE,
            f"{len(data):,} bytes that start with {data[:8].hex(' ')} are no image known here; {_CURE}",
        ) from None
    except Image.DecompressionBombError as error:
        raise MessageError(Reason.TOO_LARGE, f"{_short(error)}; send a smaller image") from None
    except Exception as error:  # noqa: BLE001 - Pillow's parsers raise anything on hostile headers
        raise MessageError(Reason.UNDECODABLE, f"the image's header is damaged ({_short(error)}); {_CURE}") from None


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


def _resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if pixels.shape[:2] == (size, size):
        return pixels
    shrinks = pixels.shape[0] >= size and pixels.shape[1] >= size
    resized: NDArray[np.uint8] = cv2.resize(
        pixels, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return resized


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
