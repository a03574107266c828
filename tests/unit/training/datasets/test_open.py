"""The opener: every layout is known by its marks, and what is not is refused with what was looked for."""

from pathlib import Path

import pytest
from helpers.image_files import write_category, write_image, write_images

from schemas.errors import DatasetError
from training.datasets.open import DatasetLayout, open_dataset


def write_each_layout(root: Path) -> dict[DatasetLayout, Path]:
    write_category(root / "mvtec" / "bottle", train=3)
    write_images(root / "btad" / "01" / "train" / "ok", 3)
    write_image(root / "tiles" / "MT_Free" / "Imgs" / "1.jpg")
    write_images(root / "visa" / "candle" / "Data" / "Images" / "Normal", 1)
    lists = {"parts.csv": "category", "visa/split_csv/1cls.csv": "object"}
    for name, column in lists.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(
            f"{column},split,label,image,mask\ncandle,train,normal,candle/Data/Images/Normal/000.png,\n",
            encoding="utf-8",
        )
    return {
        DatasetLayout.MVTEC: root / "mvtec",
        DatasetLayout.BTAD: root / "btad",
        DatasetLayout.MAGNETIC_TILE: root / "tiles",
        DatasetLayout.VISA: root / "visa",
        DatasetLayout.CSV: root / "parts.csv",
    }


def test_every_layout_is_recognised_as_what_it_is(tmp_path: Path) -> None:
    written = write_each_layout(tmp_path)
    assert {*written, DatasetLayout.AUTO} == set(DatasetLayout)
    for layout, root in written.items():
        found = open_dataset(root)
        assert found == open_dataset(root, layout=layout)
        assert found[0].images()


def test_layout_that_was_named_and_is_not_there_is_refused(tmp_path: Path) -> None:
    written = write_each_layout(tmp_path)
    for layout in written:
        for other, root in written.items():
            if other is not layout:
                with pytest.raises(DatasetError, match=f"is not a data set of layout {layout}; looked for "):
                    open_dataset(root, layout=layout)


def test_categories_asked_for_reach_the_adapter(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has no category 'lid'; it has: bottle"):
        open_dataset(write_each_layout(tmp_path)[DatasetLayout.MVTEC], ["lid"])


def test_folder_of_two_layouts_must_be_named(tmp_path: Path) -> None:
    write_images(tmp_path / "01" / "train" / "ok", 1)
    write_images(tmp_path / "bottle" / "train" / "good", 1)
    with pytest.raises(DatasetError, match=r"could be mvtec or btad; choose with --layout"):
        open_dataset(tmp_path)
    assert [data.name for data in open_dataset(tmp_path, layout=DatasetLayout.BTAD)] == ["01"]


def test_unknown_folder_is_refused_with_every_mark_that_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as refused:
        open_dataset(tmp_path)
    for told in ("train/good", "train/ok", "MT_Free", "1cls.csv", "*.csv", "--layout"):
        assert told in str(refused.value)


def test_path_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="none does not exist"):
        open_dataset(tmp_path / "none")


def test_cifar10_is_sent_to_the_export(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").touch()
    with pytest.raises(DatasetError, match=f"flawstream datasets export cifar10 TARGET --source {tmp_path}"):
        open_dataset(tmp_path)


def test_cifar10_in_pickles_is_sent_to_the_binary_version(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").touch()
    with pytest.raises(DatasetError, match=r"pickles.*https://www.cs.toronto.edu/.*binary"):
        open_dataset(tmp_path)
