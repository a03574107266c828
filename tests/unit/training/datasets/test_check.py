"""The check of a data set: every kind of fault is found, with its file, and a sound data set has none."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.image_files import HEIGHT, WIDTH, write_category, write_image, write_images, write_mask

from flawstream.imaging.pixels import PixelForm
from schemas.settings import LimitSettings, TrainingSettings
from training.datasets.check import (
    MIN_TRAIN_IMAGES,
    DatasetProblem,
    Finding,
    Severity,
    calibration_count,
    check_content,
    check_listing,
)
from training.datasets.decoding import count_files, decode_files
from training.datasets.magnetic_tile import load_magnetic_tile
from training.datasets.mvtec import load_mvtec
from training.datasets.samples import CategoryData, Sample
from training.steps.fit import split_rows

SIDE = 64


def check(data: CategoryData, limits: LimitSettings | None = None) -> list[Finding]:
    listing = check_listing(data, TrainingSettings())
    return listing + check_content(data, decode_files(data, PixelForm(SIDE), limits or LimitSettings()))


def problems(folder: Path) -> list[tuple[DatasetProblem, Path | None]]:
    return [(found.problem, found.path) for found in check(load_mvtec(folder)[0])]


@pytest.fixture
def bottle(tmp_path: Path) -> Path:
    return write_category(tmp_path / "bottle")


def test_sound_data_set_has_no_findings(bottle: Path) -> None:
    assert problems(bottle) == []


def test_all_faults_are_found_at_once(bottle: Path) -> None:
    train, broken, masks = bottle / "train/good", bottle / "test/broken", bottle / "ground_truth/broken"
    (train / "000.png").write_bytes(b"no image")
    write_image(train / "001.png", of=train / "002.png")
    write_image(bottle / "test/good/000.png", of=train / "003.png")
    (masks / "000_mask.png").unlink()
    write_mask(masks / "001_mask.png", size=(20, 20))
    write_mask(masks / "002_mask.png", empty=True)
    write_mask(masks / "009_mask.png")
    write_image(train / "004.png", colour=True, size=(WIDTH, 2 * HEIGHT))
    assert sorted(problems(bottle), key=str) == sorted(
        [
            (DatasetProblem.DAMAGED, train / "000.png"),
            (DatasetProblem.DUPLICATE, train / "002.png"),
            (DatasetProblem.LEAKAGE, bottle / "test/good/000.png"),
            (DatasetProblem.NO_MASK, broken / "000.png"),
            (DatasetProblem.MASK_SIZE, masks / "001_mask.png"),
            (DatasetProblem.EMPTY_MASK, masks / "002_mask.png"),
            (DatasetProblem.ORPHAN_MASK, masks / "009_mask.png"),
            (DatasetProblem.MIXED_SIZES, None),
            (DatasetProblem.MIXED_COLOURS, None),
        ],
        key=str,
    )


def test_training_is_refused_for_what_makes_it_wrong_and_not_for_what_makes_it_worse() -> None:
    refused = {problem for problem in DatasetProblem if Finding("can", problem, None, "").severity is Severity.ERROR}
    assert refused == {
        DatasetProblem.TOO_FEW,
        DatasetProblem.MISSING_FILE,
        DatasetProblem.ORPHAN_MASK,
        DatasetProblem.DAMAGED,
        DatasetProblem.MASK_SIZE,
        DatasetProblem.LEAKAGE,
    }


@pytest.mark.parametrize("count", [0, MIN_TRAIN_IMAGES - 1])
def test_too_few_normal_images_are_one_error(tmp_path: Path, count: int) -> None:
    (tmp_path / "bottle/train/good").mkdir(parents=True)
    write_images(tmp_path / "bottle/train/good", count)
    (found,) = check(load_mvtec(tmp_path)[0])
    assert (found.problem, found.severity) == (DatasetProblem.TOO_FEW, Severity.ERROR)
    assert found.text.startswith(f"{count or 'no'} normal training images; at least 10 are needed")


def test_too_few_images_for_the_false_alarm_rate_are_a_warning(tmp_path: Path) -> None:
    write_images(tmp_path / "bottle/train/good", 90)
    (found,) = check(load_mvtec(tmp_path)[0])
    assert (found.problem, found.severity) == (DatasetProblem.FALSE_ALARM_RATE, Severity.WARNING)
    assert "needs 19 calibration images and there are 18" in found.text
    (data,) = load_mvtec(tmp_path)
    assert check_listing(data, TrainingSettings(false_alarm_rate=0.1)) == []
    assert check_listing(data, TrainingSettings(calibration_fraction=0.3)) == []


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.25, 0.5])
@pytest.mark.parametrize("count", [10, 11, 37, 90, 250])
def test_calibration_images_are_counted_as_training_holds_them_out(count: int, fraction: float) -> None:
    _, held_out = split_rows(count, TrainingSettings(calibration_fraction=fraction))
    assert calibration_count(count, fraction) == len(held_out)


def test_files_that_are_listed_and_not_there_are_errors_told_once(bottle: Path) -> None:
    (data,) = load_mvtec(bottle)
    image, mask = data.train[0], data.masks()[0]
    image.unlink()
    mask.unlink()
    assert [(found.problem, found.path) for found in check(data)] == [
        (DatasetProblem.MISSING_FILE, image),
        (DatasetProblem.MISSING_FILE, mask),
    ]
    assert count_files(data) == len(data.files()) - 2


def test_listing_opens_no_file(bottle: Path) -> None:
    for path in bottle.rglob("*.png"):
        path.write_bytes(b"")
    assert check_listing(load_mvtec(bottle)[0], TrainingSettings()) == []
    assert {problem for problem, _ in problems(bottle)} == {DatasetProblem.DAMAGED}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_truncated_image_is_damaged(bottle: Path, suffix: str) -> None:
    path = write_image(bottle / "train/good" / f"cut{suffix}", size=(200, 200), colour=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert problems(bottle) == [(DatasetProblem.DAMAGED, path)]


def test_damaged_mask_is_an_error(bottle: Path) -> None:
    mask = bottle / "ground_truth/broken/000_mask.png"
    mask.write_bytes(b"no mask")
    assert problems(bottle) == [(DatasetProblem.DAMAGED, mask)]


def test_image_beyond_the_limits_is_an_error(bottle: Path) -> None:
    (data,) = load_mvtec(bottle)
    found = check(data, LimitSettings(max_pixels=WIDTH * HEIGHT - 1))
    assert len(found) == len(data.images())
    assert {one.problem for one in found} == {DatasetProblem.DAMAGED}
    assert "limits.max_pixels" in found[0].text


def test_masks_are_missed_only_where_others_have_one(bottle: Path) -> None:
    for mask in (bottle / "ground_truth/broken").iterdir():
        mask.unlink()
    assert problems(bottle) == []


def test_same_picture_in_another_format_is_the_same(bottle: Path) -> None:
    twin = write_image(bottle / "test/good/twin.bmp", of=bottle / "train/good/007.png")
    assert problems(bottle) == [(DatasetProblem.LEAKAGE, twin)]


def test_same_file_listed_for_both_is_leakage(bottle: Path) -> None:
    (data,) = load_mvtec(bottle)
    both = Sample(data.train[5], anomalous=False, defect="good", mask=None)
    found = check(CategoryData(data.name, data.train, (*data.test, both)))
    assert [(one.problem, one.path, one.severity) for one in found] == [
        (DatasetProblem.LEAKAGE, data.train[5], Severity.ERROR)
    ]
    assert str(data.train[5]) in found[0].text


def test_defective_image_that_trains_as_normal_is_leakage(bottle: Path) -> None:
    write_image(bottle / "train/good/bad.png", of=bottle / "test/broken/001.png")
    assert problems(bottle) == [(DatasetProblem.LEAKAGE, bottle / "test/broken/001.png")]


def test_sizes_are_counted_and_told_apart_from_aspects(bottle: Path) -> None:
    write_image(bottle / "train/good/large.png", size=(2 * WIDTH, 2 * HEIGHT))
    (found,) = check(load_mvtec(bottle)[0])
    assert (found.problem, found.severity) == (DatasetProblem.MIXED_SIZES, Severity.WARNING)
    assert "2 image sizes: 105 of 40 x 30, 1 of 80 x 60, so that the same detail" in found.text
    write_image(bottle / "train/good/tall.png", size=(HEIGHT, WIDTH))
    (found,) = check(load_mvtec(bottle)[0])
    assert "aspect ratios from 0.75 to 1.33" in found.text


def test_grey_and_colour_are_counted_by_what_they_show(bottle: Path) -> None:
    write_image(bottle / "test/good/colour.png", colour=True)
    cv2.imwrite(str(bottle / "test/good/yellow.png"), np.full((HEIGHT, WIDTH, 3), (0, 200, 200), np.uint8))
    cv2.imwrite(str(bottle / "test/good/grey.png"), np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    (found,) = check(load_mvtec(bottle)[0])
    assert (found.problem, found.severity) == (DatasetProblem.MIXED_COLOURS, Severity.WARNING)
    assert "106 grey images and 2 with colour" in found.text


def test_magnetic_tiles_are_checked_with_their_masks(tmp_path: Path) -> None:
    for number in range(125):
        photograph = write_image(tmp_path / "MT_Free/Imgs" / f"exp1_num_{number}.jpg")
        write_mask(photograph.with_suffix(".png"), empty=True)
    for kind in ("Crack", "Uneven"):
        photograph = write_image(tmp_path / f"MT_{kind}/Imgs/exp1_num_1.jpg")
        write_mask(photograph.with_suffix(".png"), empty=kind == "Uneven")
    (data,) = load_magnetic_tile(tmp_path)
    assert count_files(data) == 125 + 2 * 2
    assert [(found.problem, found.path) for found in check(data)] == [
        (DatasetProblem.EMPTY_MASK, tmp_path / "MT_Uneven/Imgs/exp1_num_1.png")
    ]


def test_file_that_is_longer_than_the_stream_takes_is_found(bottle: Path) -> None:
    longest = max(path.stat().st_size for path in (bottle / "train/good").iterdir())
    limits = LimitSettings(max_image_bytes=max(1024, longest))
    path = bottle / "train/good/000.png"
    path.write_bytes(path.read_bytes() + bytes(limits.max_image_bytes))
    (found,) = check(load_mvtec(bottle)[0], limits)
    assert (found.problem, found.path) == (DatasetProblem.DAMAGED, path)
    assert "raise limits.max_image_bytes" in found.text
