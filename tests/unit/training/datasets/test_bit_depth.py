"""The depth of a category: found from all its images, warned of, and the same in training and serving."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from flawstream.imaging.decode import decode_image
from flawstream.imaging.levels import Levels
from flawstream.imaging.pixels import PixelForm
from schemas.errors import DatasetError
from schemas.settings import BitDepth, LimitSettings
from training.datasets.bit_depth import find_bit_depth, warn_of_depth
from training.datasets.check import DatasetProblem, Severity, check_content
from training.datasets.decoding import decode_files
from training.datasets.samples import CategoryData, Sample

LIMITS = LimitSettings()


def category(folder: Path, *highest: int, test: int | None = None, eight: int = 0) -> CategoryData:
    """Write images of 16 bits with these highest levels, and some of 8."""
    random = np.random.default_rng(0)
    paths = []
    for number, level in enumerate([*highest, *([test] if test is not None else []), *[255] * eight]):
        dtype = np.uint8 if number >= len(highest) + (test is not None) else np.uint16
        image = random.integers(0, level + 1, (40, 40)).astype(dtype)
        image[0, 0] = level
        paths.append(folder / f"{number:03}.png")
        cv2.imwrite(str(paths[-1]), image)
    samples = []
    if test is not None:
        samples.append(Sample(paths.pop(len(highest)), anomalous=True, defect="glint", mask=None))
    return CategoryData("bottle", tuple(paths), tuple(samples))


@pytest.mark.parametrize(
    ("highest", "bits"),
    [((900, 1000), 10), ((300, 4000), 12), ((200, 4096), 14), ((9, 65535), 16), ((80, 90), 8), ((), 16)],
)
def test_depth_is_found_from_all_images(tmp_path: Path, highest: tuple[int, ...], bits: int) -> None:
    assert find_bit_depth(category(tmp_path, *highest, eight=2), LIMITS) == bits


def test_brighter_test_image_counts(tmp_path: Path) -> None:
    assert find_bit_depth(category(tmp_path, 900, 1000, test=3000), LIMITS) == 12


def test_images_of_eight_bits_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = category(tmp_path, eight=3)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    assert find_bit_depth(data, LIMITS) == 16


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    data = category(tmp_path, 900, 1000)
    data.train[0].write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"000\.png"):
        find_bit_depth(data, LIMITS)


def check(data: CategoryData, given: BitDepth | None = None) -> list[str]:
    findings = check_content(data, decode_files(data, PixelForm(32), LIMITS), LIMITS, given)
    assert all(one.severity is Severity.WARNING for one in findings)
    return [one.text for one in findings if one.problem is DatasetProblem.BIT_DEPTH]


def test_check_warns_of_a_depth_that_was_found(tmp_path: Path) -> None:
    (text,) = check(category(tmp_path, 900, 4000))
    assert "no level over 4,000: 12 bits are read" in text
    assert "training.bit_depths" in text
    assert check(category(tmp_path, 900, 4000), 12) == []
    assert check(category(tmp_path, 900, 65535)) == []
    assert check(category(tmp_path, eight=2)) == []


def test_check_warns_of_levels_over_the_depth_in_the_settings(tmp_path: Path) -> None:
    (text,) = check(category(tmp_path, 900, 4000), 10)
    assert "levels up to 4,000 are over the 10 bits" in text


def test_check_warns_of_eight_bits_beside_sixteen(tmp_path: Path) -> None:
    (text,) = check(category(tmp_path, 900, 4000, eight=3), 12)
    assert "3 images have 8 bits and 2 have 16, of which 12 are read" in text


def test_warning_of_levels_below_zero() -> None:
    assert "levels down to -7 become black" in str(warn_of_depth([Levels(-7, 40_000, 16)]))


def test_dark_images_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """Read by 16 bits, none of these has a level but 0."""
    data = category(tmp_path, 200, 210, 220)
    findings = check_content(data, decode_files(data, PixelForm(32), LIMITS), LIMITS)
    assert [one.problem for one in findings] == [DatasetProblem.BIT_DEPTH]


def test_picture_of_twelve_bits_is_that_of_eight_at_the_depth_that_is_found(tmp_path: Path) -> None:
    data = category(tmp_path, 900, 4095)
    bits = find_bit_depth(data, LIMITS)
    for path in data.train:
        eight = (np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)) >> 4).astype(np.uint8)
        expected = decode_image(cv2.imencode(".png", eight)[1].tobytes(), PixelForm(32), LIMITS)
        assert np.array_equal(decode_image(path.read_bytes(), PixelForm(32, bits=bits), LIMITS).pixels, expected.pixels)
