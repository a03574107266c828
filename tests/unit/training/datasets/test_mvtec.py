"""Data set folders: what is found, in which order, and what is refused with which words."""

import os
import shutil
from pathlib import Path

import pytest

from schemas.errors import DatasetError
from schemas.manifest import DefectMetrics
from training.datasets.btad import load_btad
from training.datasets.mvtec import load_mvtec
from training.datasets.samples import Sample, Skip, Skipped

TRAIN_IMAGES = 10


def fill(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(os.fsencode(name))


def make_category(root: Path, name: str = "bottle") -> Path:
    folder = root / name
    fill(folder / "train" / "good", *(f"{k:03}.png" for k in range(TRAIN_IMAGES)))
    fill(folder / "test" / "good", "000.png")
    fill(folder / "test" / "broken", "001.png", "000.png", "002.png")
    fill(folder / "ground_truth" / "broken", "000_mask.png", "001.png")
    return folder


def test_images_labels_and_masks_are_found_in_order(tmp_path: Path) -> None:
    folder = make_category(tmp_path)
    (bottle,) = load_mvtec(tmp_path)
    assert bottle.name == "bottle"
    assert [path.name for path in bottle.train] == [f"{k:03}.png" for k in range(TRAIN_IMAGES)]
    broken, masks = folder / "test" / "broken", folder / "ground_truth" / "broken"
    assert bottle.test == (
        Sample(broken / "000.png", anomalous=True, defect="broken", mask=masks / "000_mask.png"),
        Sample(broken / "001.png", anomalous=True, defect="broken", mask=masks / "001.png"),
        Sample(broken / "002.png", anomalous=True, defect="broken", mask=None),
        Sample(folder / "test" / "good" / "000.png", anomalous=False, defect="good", mask=None),
    )


def test_category_needs_no_test_images(tmp_path: Path) -> None:
    shutil.rmtree(make_category(tmp_path) / "test")
    shutil.rmtree(tmp_path / "bottle" / "ground_truth")
    assert load_mvtec(tmp_path)[0].test == ()


def test_root_may_be_one_categorys_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_category(tmp_path)
    assert load_mvtec(folder) == load_mvtec(tmp_path)
    monkeypatch.chdir(folder)
    assert load_mvtec(Path())[0].name == "bottle"


def test_categories_come_by_name_or_as_asked_for(tmp_path: Path) -> None:
    for name in ("tile", "bottle", "cable"):
        make_category(tmp_path, name)
    (tmp_path / "licenses").mkdir()
    assert [data.name for data in load_mvtec(tmp_path)] == ["bottle", "cable", "tile"]
    assert [data.name for data in load_mvtec(tmp_path, ["tile", "bottle", "tile"])] == ["tile", "bottle"]


def test_unknown_category_is_refused_with_the_known(tmp_path: Path) -> None:
    make_category(tmp_path)
    make_category(tmp_path, "tile")
    with pytest.raises(DatasetError, match=r"no category 'cable'; it has: bottle, tile"):
        load_mvtec(tmp_path, ["cable"])
    with pytest.raises(DatasetError, match=r"it has: bottle"):
        load_mvtec(tmp_path / "bottle", ["tile"])


@pytest.mark.parametrize("mask", ["broken/003_mask.png", "broken/000_mask_mask.png", "scratched/000_mask.png"])
def test_mask_without_an_image_is_kept_apart(tmp_path: Path, mask: str) -> None:
    path = make_category(tmp_path) / "ground_truth" / mask
    fill(path.parent, path.name)
    assert load_mvtec(tmp_path)[0].orphan_masks == (path,)


@pytest.mark.parametrize("name", ["good", "Good", "normal", "Normal", "OK", "ok"])
def test_normal_images_are_known_by_any_usual_name(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "bottle" / "train" / "good", "0.png")
    fill(tmp_path / "bottle" / "test" / name, "1.png")
    fill(tmp_path / "lid" / "train" / name, "0.png")
    bottle, *lids = load_mvtec(tmp_path)
    assert [(sample.defect, sample.anomalous) for sample in bottle.test] == [("good", False)]
    (lid,) = lids or load_btad(tmp_path)
    assert [path.parent.name for path in lid.train] == [name]


def test_loco_has_validation_images_and_a_folder_of_masks_for_each_image(tmp_path: Path) -> None:
    folder = tmp_path / "box"
    fill(folder / "train/good", "000.png", "001.png")
    fill(folder / "validation/good", "000.png")
    fill(folder / "test/good", "000.png")
    for kind in ("logical_anomalies", "structural_anomalies"):
        fill(folder / "test" / kind, "000.png", "001.png")
        fill(folder / "ground_truth" / kind / "000", "000.png", "001.png")
        fill(folder / "ground_truth" / kind / "001", "000.png")
        fill(folder / "ground_truth" / kind / "009", "000.png")
    (box,) = load_mvtec(tmp_path)
    assert box.train == (
        folder / "train/good/000.png",
        folder / "train/good/001.png",
        folder / "validation/good/000.png",
    )
    assert [
        [str(mask.relative_to(folder / "ground_truth" / sample.defect)) for mask in sample.masks] for sample in box.test
    ] == [[], *2 * [["000/000.png", "000/001.png"], ["001/000.png"]]]
    assert [path.parent.name for path in box.orphan_masks] == ["009", "009"]
    assert len(box.masks()) == 6
    assert box.skipped == ()


@pytest.mark.parametrize("ground_truth", ["test_public/ground_truth", "ground_truth"])
def test_ad2_has_a_public_test_with_its_own_masks(tmp_path: Path, ground_truth: str) -> None:
    folder = tmp_path / "can"
    for name in ("train/good", "validation/good", "test_public/good", "test_public/bad", "test_private"):
        fill(folder / name, "000_regular.png")
    fill(folder / ground_truth / "bad", "000_regular_mask.png")
    (can,) = load_mvtec(tmp_path)
    assert [path.parent.parent.name for path in can.train] == ["train", "validation"]
    assert [(sample.defect, sample.masks) for sample in can.test] == [
        ("bad", (folder / ground_truth / "bad/000_regular_mask.png",)),
        ("good", ()),
    ]
    assert can.skipped == (Skipped(folder / "test_private", Skip.SUBFOLDER),)


def test_names_of_any_bytes_are_read_and_kinds_of_defect_are_text(tmp_path: Path) -> None:
    folder = tmp_path / "bottle"
    fill(folder / "train" / "good", os.fsdecode(b"gut_\xfc.png"))
    fill(folder / "test" / os.fsdecode(b"gro\xdf"), os.fsdecode(b"\xfc.png"))
    fill(folder / "ground_truth" / os.fsdecode(b"gro\xdf"), os.fsdecode(b"\xfc_mask.png"))
    (bottle,) = load_mvtec(tmp_path)
    (sample,) = bottle.test
    assert sample.defect == r"gro\udcdf"
    assert DefectMetrics(defect=sample.defect, images=1).model_dump_json()  # as the manifest is written
    assert [os.fsencode(path.name) for path in bottle.files()] == [b"gut_\xfc.png", b"\xfc.png", b"\xfc_mask.png"]
    assert all(path.is_file() for path in bottle.files())
    assert bottle.sha256()


def test_digest_tells_content_and_not_place(tmp_path: Path) -> None:
    here, there = make_category(tmp_path / "a"), make_category(tmp_path / "b", "copy")
    digest = load_mvtec(here)[0].sha256()
    assert load_mvtec(there)[0].sha256() == digest
    (there / "train" / "good" / "000.png").write_bytes(b"other")
    assert load_mvtec(there)[0].sha256() != digest


@pytest.mark.parametrize("old", ["train/good/000.png", "test/broken/002.png", "ground_truth/broken/001.png"])
def test_digest_changes_where_a_file_goes(tmp_path: Path, old: str) -> None:
    folder = make_category(tmp_path)
    fill(folder / "train" / "good", "extra.png")
    digest = load_mvtec(folder)[0].sha256()
    (folder / old).unlink()
    assert load_mvtec(folder)[0].sha256() != digest
