"""VisA as it is released: the split file decides, paths are those of the data set's root."""

from pathlib import Path

import pytest

from schemas.errors import DatasetError
from training.datasets.samples import Sample
from training.datasets.visa import is_visa, load_visa


def write_split(root: Path) -> None:
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text(
        "object,split,label,image,mask\n"
        "candle,train,normal,candle/Data/Images/Normal/0836.JPG,\n"
        "candle,test,normal,candle/Data/Images/Normal/0001.JPG,\n"
        "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png\n"
        "pcb1,train,normal,pcb1/Data/Images/Normal/0002.JPG,\n",
        encoding="utf-8",
    )


def test_split_file_says_what_trains_and_what_tests(tmp_path: Path) -> None:
    write_split(tmp_path)
    candle, pcb1 = load_visa(tmp_path)
    images = tmp_path / "candle" / "Data" / "Images"
    mask = tmp_path / "candle" / "Data" / "Masks" / "Anomaly" / "000.png"
    assert candle.train == (images / "Normal" / "0836.JPG",)
    assert candle.test == (
        Sample(images / "Anomaly" / "000.JPG", anomalous=True, defect="anomaly", mask=mask),
        Sample(images / "Normal" / "0001.JPG", anomalous=False, defect="good", mask=None),
    )
    assert (pcb1.name, pcb1.test) == ("pcb1", ())
    assert load_visa(tmp_path, ["pcb1"]) == [pcb1]


def test_categories_without_the_split_file_are_known_and_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "candle" / "Data" / "Images" / "Normal").mkdir(parents=True)
    assert is_visa(tmp_path)
    with pytest.raises(DatasetError, match=r"1cls.csv is missing.*extract it from the same archive"):
        load_visa(tmp_path)
