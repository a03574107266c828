"""The check of a data set: every kind of fault is found, with its file, and a sound data set has none."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.image_files import HEIGHT, WIDTH, write_category, write_image, write_images, write_mask

from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError
from schemas.settings import LimitSettings, TrainingSettings
from schemas.wire import parse_image
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
from training.datasets.samples import CategoryData, Sample, Skip
from training.steps.fit import split_rows

SIDE = 64


def check(data: CategoryData, limits: LimitSettings | None = None) -> list[Finding]:
    limits = limits or LimitSettings()
    listing = check_listing(data, TrainingSettings())
    return listing + check_content(data, decode_files(data, PixelForm(SIDE), limits), limits)


def problems(folder: Path) -> list[tuple[DatasetProblem, Path | None]]:
    """Return all findings but notes."""
    return [(found.problem, found.path) for found in faults(load_mvtec(folder)[0])]


def faults(data: CategoryData) -> list[Finding]:
    return [found for found in check(data) if found.severity is not Severity.NOTE]


def found_of(problem: DatasetProblem, folder: Path) -> Finding:
    (found,) = (found for found in check(load_mvtec(folder)[0]) if found.problem is problem)
    return found


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
        DatasetProblem.ALL_ALIKE,
        DatasetProblem.UNWRITABLE,
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
    assert [(found.problem, found.path) for found in faults(data)] == [
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
    found = [one for one in check(data, LimitSettings(max_pixels=WIDTH * HEIGHT - 1)) if one.path is not None]
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
    found = faults(CategoryData(data.name, data.train, (*data.test, both)))
    assert [(one.problem, one.path, one.severity) for one in found] == [
        (DatasetProblem.LEAKAGE, data.train[5], Severity.ERROR)
    ]
    assert str(data.train[5]) in found[0].text


def test_defective_image_that_trains_as_normal_is_leakage(bottle: Path) -> None:
    write_image(bottle / "train/good/bad.png", of=bottle / "test/broken/001.png")
    assert problems(bottle) == [(DatasetProblem.LEAKAGE, bottle / "test/broken/001.png")]


def test_sizes_are_counted_and_told_apart_from_aspects(bottle: Path) -> None:
    write_image(bottle / "train/good/large.png", size=(2 * WIDTH, 2 * HEIGHT))
    (found,) = faults(load_mvtec(bottle)[0])
    assert (found.problem, found.severity) == (DatasetProblem.MIXED_SIZES, Severity.WARNING)
    assert "2 image sizes: 105 of 40 x 30, 1 of 80 x 60, so that the same detail" in found.text
    write_image(bottle / "train/good/tall.png", size=(HEIGHT, WIDTH))
    (found,) = faults(load_mvtec(bottle)[0])
    assert "aspect ratios from 0.75 to 1.33" in found.text


def test_grey_and_colour_are_counted_by_what_they_show(bottle: Path) -> None:
    write_image(bottle / "test/good/colour.png", colour=True)
    cv2.imwrite(str(bottle / "test/good/yellow.png"), np.full((HEIGHT, WIDTH, 3), (0, 200, 200), np.uint8))
    cv2.imwrite(str(bottle / "test/good/grey.png"), np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    (found,) = faults(load_mvtec(bottle)[0])
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
    assert [(found.problem, found.path) for found in faults(data)] == [
        (DatasetProblem.EMPTY_MASK, tmp_path / "MT_Uneven/Imgs/exp1_num_1.png")
    ]


def test_whatever_is_not_read_is_counted_by_folder(bottle: Path) -> None:
    train = bottle / "train/good"
    for number in range(4):
        (train / f"link{number}.png").symlink_to("/nowhere/image.png")
    write_images(train / "2026-01", 5)
    write_images(bottle / "test_private", 2)
    write_images(bottle / "train/bad", 1)
    write_image(bottle / "test/000.png")
    (train / "image.raw").touch()
    for name in (".DS_Store", "._000.png", "Thumbs.db"):
        (train / name).touch()
    (bottle / "readme.txt").touch()
    skips = {problem.value for problem in DatasetProblem} & {skip.value for skip in Skip}
    assert skips == {skip.value for skip in Skip}
    found = [one for one in check_listing(load_mvtec(bottle)[0], TrainingSettings()) if one.problem in skips]
    assert sorted((one.problem, one.path, one.count) for one in found) == sorted(
        [
            (DatasetProblem.DANGLING_LINK, train, 4),
            (DatasetProblem.SUBFOLDER, train, 5),
            (DatasetProblem.SUBFOLDER, bottle, 2),
            (DatasetProblem.SUBFOLDER, bottle / "train", 1),
            (DatasetProblem.MISPLACED_IMAGE, bottle / "test", 1),
            (DatasetProblem.OTHER_FILE, train, 1),
            (DatasetProblem.HIDDEN_FILE, train, 3),
        ]
    )
    assert {one.severity for one in found if one.problem is not DatasetProblem.HIDDEN_FILE} == {Severity.WARNING}
    (links,) = (one for one in found if one.problem is DatasetProblem.DANGLING_LINK)
    assert "do not exist, not read: 4 (link0.png, link1.png, link2.png, ...); restore" in links.text


def test_two_names_of_normal_images_side_by_side_are_reported(bottle: Path) -> None:
    write_images(bottle / "train/OK", 1)
    assert problems(bottle) == [(DatasetProblem.NORMAL_NAMES, bottle / "train")]
    assert "has the folders OK, good: all mean normal" in found_of(DatasetProblem.NORMAL_NAMES, bottle).text


def test_share_that_masks_mark_is_shown(bottle: Path) -> None:
    marked = (HEIGHT // 2 - HEIGHT // 3) * (WIDTH // 2 - WIDTH // 3) / (WIDTH * HEIGHT)
    note = found_of(DatasetProblem.MARKED, bottle)
    assert note.severity is Severity.NOTE
    assert f"masks of 3 images mark {marked:.2%} of their pixels on average" in note.text


def test_inverted_and_lossy_masks_are_suspected(bottle: Path) -> None:
    masks = bottle / "ground_truth/broken"
    cv2.imwrite(str(masks / "000_mask.png"), np.tri(HEIGHT, WIDTH, 10, np.uint8))  # more than half
    write_mask(masks / "001_mask.jpg")
    (masks / "001_mask.png").unlink()
    assert problems(bottle) == [
        (DatasetProblem.INVERTED_MASK, masks / "000_mask.png"),
        (DatasetProblem.JPEG_MASK, masks / "001_mask.jpg"),
    ]


def test_images_that_are_all_alike_are_one_error_with_its_cause(bottle: Path) -> None:
    for path in (bottle / "train/good").iterdir():
        write_image(path, of="black")
    (found,) = faults(load_mvtec(bottle)[0])
    assert (found.problem, found.severity, found.count) == (DatasetProblem.ALL_ALIKE, Severity.ERROR, 100)


def test_images_that_the_stream_refuses_for_their_length_are_a_warning(bottle: Path) -> None:
    (data,) = load_mvtec(bottle)
    longest = max(path.stat().st_size for path in data.images())
    assert not [one for one in check(data, LimitSettings(max_image_bytes=longest)) if one.severity is Severity.WARNING]
    limits = LimitSettings(max_image_bytes=longest - 1)
    (found,) = (one for one in check(data, limits) if one.severity is Severity.WARNING)
    with pytest.raises(MessageError, match="max_image_bytes"):
        parse_image("0-0", {b"category": b"bottle", b"image": bytes(longest)}, limits)
    assert (found.problem, found.path is not None) == (DatasetProblem.TOO_LONG, True)
    assert f"has {longest:,} bytes, more than the {longest - 1:,} that the stream takes" in found.text
