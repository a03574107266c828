"""Folders of images: what counts as an image, whose mask is whose, which names can be categories."""

from pathlib import Path

import pytest

from schemas.errors import DatasetError
from training.datasets.folders import choose_categories, image_files, list_folders, list_images, match_masks
from training.datasets.samples import Sample, split_normal


def test_suffixes_count_in_any_case_and_other_files_do_not(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.Tiff", "d.jfif", "e.JPE", "Thumbs.db", ".DS_Store", "._a.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG", "c.Tiff", "d.jfif", "e.JPE"]
    assert [path.name for path in list_images(tmp_path, [".jpg"])] == ["b.JPG"]
    assert [path.name for path in list_folders(tmp_path)] == ["folder.png"]


def test_images_below_folders_are_found_but_for_hidden_ones(tmp_path: Path) -> None:
    hidden = tmp_path / "line" / ".trash" / "c.png"
    for path in (tmp_path / "line/day/b.png", tmp_path / "line/a.JPG", tmp_path / "line/._a.JPG", hidden):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert list(image_files([tmp_path / "line", hidden])) == [
        tmp_path / "line/a.JPG",
        tmp_path / "line/day/b.png",
        hidden,
    ]
    assert list(image_files([hidden.parent])) == [hidden]  # a folder that was named is read


def test_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert list_images(tmp_path / "none") == ()
    assert list_folders(tmp_path / "none") == []


def test_mask_belongs_to_the_image_whose_name_it_bears(tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("1.png", "2.png", "3.png")]
    masks = [tmp_path / "m" / name for name in ("1_mask.png", "2.bmp", "4_mask.png", "1.png")]
    samples, orphans = match_masks(images, masks, "bent")
    assert samples == [
        Sample(images[0], anomalous=True, defect="bent", mask=masks[0]),
        Sample(images[1], anomalous=True, defect="bent", mask=masks[1]),
        Sample(images[2], anomalous=True, defect="bent", mask=None),
    ]
    assert orphans == [masks[2], masks[3]]


def test_categories_come_by_name_or_as_asked_for_each_once() -> None:
    found = {"tile": 1, "bottle": 2, "cable": 3}
    assert list(choose_categories(Path("data"), found, None)) == ["bottle", "cable", "tile"]
    assert choose_categories(Path("data"), found, ["tile", "bottle", "tile"]) == {"tile": 1, "bottle": 2}


def test_unknown_category_is_refused_with_the_known() -> None:
    with pytest.raises(DatasetError, match=r"data has no category 'can', 'lid'; it has: bottle, tile"):
        choose_categories(Path("data"), {"tile": 1, "bottle": 2}, ["can", "tile", "lid"])


@pytest.mark.parametrize("name", ["my bottle", "flaschengröße", "-bottle", "..", "b" * 129])
def test_name_that_cannot_be_a_categorys_is_refused_only_where_it_is_wanted(name: str) -> None:
    found = {name: 1, "tile": 2}
    assert choose_categories(Path("data"), found, ["tile"]) == {"tile": 2}
    with pytest.raises(DatasetError, match="is not a valid category name"):
        choose_categories(Path("data"), found, None)


def test_split_is_the_same_whatever_the_order_and_loses_nothing() -> None:
    names = [f"{number:02}.jpg" for number in range(50)]
    train, tested = split_normal(reversed(names), 0.8)
    assert (train, tested) == split_normal(names, 0.8)
    assert (len(train), len(tested)) == (40, 10)
    assert sorted(train + tested) == names
    assert train == sorted(train)
    assert train != names[:40]
