"""The magnetic tiles: which photographs train, whose masks count, and the split that is ours."""

from pathlib import Path

import pytest
from helpers.image_files import write_image, write_mask

from schemas.errors import DatasetError
from training.datasets.magnetic_tile import load_magnetic_tile
from training.datasets.samples import Sample, Skip, Skipped


def write_tiles(root: Path) -> Path:
    """Write the data set's structure: photographs and masks side by side, empty masks where nothing is wrong."""
    for kind, count in (("Free", 20), ("Crack", 2), ("Blowhole", 1)):
        for number in range(count):
            photograph = write_image(root / f"MT_{kind}" / "Imgs" / f"exp1_num_{number}.jpg")
            write_mask(photograph.with_suffix(".png"), empty=kind == "Free")
    (root / "README.md").touch()
    return root


def test_four_fifths_of_the_normal_tiles_train_and_all_else_tests(tmp_path: Path) -> None:
    (data,) = load_magnetic_tile(write_tiles(tmp_path))
    assert data.name == "magnetic_tile"
    normal = [sample.path for sample in data.test if not sample.anomalous]
    assert (len(data.train), len(normal)) == (16, 4)
    assert {*data.train, *normal} == set((tmp_path / "MT_Free" / "Imgs").glob("*.jpg"))
    crack = tmp_path / "MT_Crack" / "Imgs"
    assert data.test[:3] == (
        Sample(
            tmp_path / "MT_Blowhole" / "Imgs" / "exp1_num_0.jpg",
            anomalous=True,
            defect="blowhole",
            mask=tmp_path / "MT_Blowhole" / "Imgs" / "exp1_num_0.png",
        ),
        Sample(crack / "exp1_num_0.jpg", anomalous=True, defect="crack", mask=crack / "exp1_num_0.png"),
        Sample(crack / "exp1_num_1.jpg", anomalous=True, defect="crack", mask=crack / "exp1_num_1.png"),
    )


def test_split_is_the_same_wherever_the_folder_lies(tmp_path: Path) -> None:
    (here,), (there,) = (load_magnetic_tile(write_tiles(tmp_path / name)) for name in ("a", "b"))
    assert [path.name for path in here.train] == [path.name for path in there.train]


def test_mask_of_a_photograph_that_is_gone_is_an_orphan(tmp_path: Path) -> None:
    crack = write_tiles(tmp_path) / "MT_Crack" / "Imgs"
    (crack / "exp1_num_0.jpg").unlink()
    assert load_magnetic_tile(tmp_path)[0].orphan_masks == (crack / "exp1_num_0.png",)


def test_what_is_not_read_is_listed(tmp_path: Path) -> None:
    crack = write_tiles(tmp_path) / "MT_Crack" / "Imgs"
    write_image(crack / "more" / "1.jpg")
    (crack / "1.raw").touch()
    assert load_magnetic_tile(tmp_path)[0].skipped == (
        Skipped(crack / "1.raw", Skip.OTHER_FILE),
        Skipped(crack / "more", Skip.SUBFOLDER),
    )


def test_other_category_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="it has: magnetic_tile"):
        load_magnetic_tile(write_tiles(tmp_path), ["bottle"])
