"""Masks: what is marked in every kind of file, and what is left of it at the size of the map."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import DatasetError
from training.datasets.masks import decode_mask, read_masks, reduce_mask

MARKED = np.zeros((37, 50), np.bool_)
MARKED[20:30, 11:14] = True


def opencv(values: NDArray[Any], suffix: str = ".png", *options: int) -> bytes:
    return bytes(cv2.imencode(suffix, values, options)[1])


def pillow(image: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def palette() -> Image.Image:
    image = Image.fromarray(MARKED.astype(np.uint8), "L").convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0] + 254 * [0, 0, 0])
    return image


def painted(colour: tuple[int, int, int, int], ground: tuple[int, int, int, int]) -> bytes:
    return opencv(np.where(MARKED[:, :, None], np.array(colour, np.uint8), np.array(ground, np.uint8)))


FILES = {
    "8 bits, value 1": opencv(MARKED.astype(np.uint8)),
    "16 bits, value 1": opencv(MARKED.astype(np.uint16)),
    "floats": opencv(MARKED.astype(np.float32) / 1000, ".tif"),
    "32 bits": pillow(Image.fromarray(MARKED.astype(np.int32)), "TIFF"),
    "1 bit": pillow(Image.fromarray(MARKED), "PNG"),
    "1 bit TIFF": pillow(Image.fromarray(MARKED), "TIFF"),
    "palette": pillow(palette(), "PNG"),
    "palette TIFF": pillow(palette(), "TIFF"),
    "one dark colour": opencv(MARKED[:, :, None] * np.array([0, 0, 1], np.uint8)),
    "16 bits a colour": opencv(MARKED[:, :, None] * np.array([0, 1, 0], np.uint16)),
    "opaque colour on opaque black": painted((0, 0, 200, 255), (0, 0, 0, 255)),
    "opaque colour on transparent white": painted((0, 0, 200, 255), (255, 255, 255, 0)),
    "opaque black on transparent black": painted((0, 0, 0, 255), (0, 0, 0, 0)),
    "JPEG": opencv(MARKED * np.uint8(255), ".jpg", cv2.IMWRITE_JPEG_QUALITY, 50),
}


@pytest.mark.parametrize("kind", FILES)
def test_anything_but_0_is_a_defect_in_every_kind_of_file(kind: str) -> None:
    assert np.array_equal(decode_mask(FILES[kind]), MARKED)


def test_black_masks_mark_nothing() -> None:
    for data in (opencv(np.zeros((9, 9), np.uint8), ".jpg"), opencv(np.full((9, 9, 4), (0, 0, 0, 255), np.uint8))):
        assert not decode_mask(data).any()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_reduced_pixel_is_marked_if_any_of_its_area_is(height: int, width: int, side: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.05
    expected = np.zeros((side, side), np.bool_)
    for row, column in np.argwhere(mask):
        expected[row * side // height : -(-(row + 1) * side // height)][
            :, column * side // width : -(-(column + 1) * side // width)
        ] = True
    assert np.array_equal(reduce_mask(mask, side), expected)


def test_defect_of_3_pixels_in_2048_is_kept_at_256(tmp_path: Path) -> None:
    for left in range(1001, 1009):
        mask = np.zeros((2048, 2048), np.uint8)
        mask[:, left : left + 3] = 255
        (tmp_path / "mask.png").write_bytes(opencv(mask))
        assert read_masks([tmp_path / "mask.png"], 256).any(axis=1).all()


def test_masks_of_one_image_are_joined(tmp_path: Path) -> None:
    for name, rows in (("0.png", slice(0, 2)), ("1.png", slice(6, 8))):
        mask = np.zeros((8, 8), np.uint8)
        mask[rows] = 1
        (tmp_path / name).write_bytes(opencv(mask))
    joined = read_masks([tmp_path / "0.png", tmp_path / "1.png"], 4)
    assert joined.all(axis=1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("data", [b"", b"no mask"])
def test_file_that_is_no_image_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "0_mask.png").write_bytes(data)
    with pytest.raises(DatasetError, match=r"cannot read the mask .*0_mask\.png"):
        read_masks([tmp_path / "0_mask.png"], 4)
