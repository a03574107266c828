"""Data sets as lists: labels, paths, and every wrong line named at once."""

import os
from pathlib import Path

import pytest

from schemas.errors import DatasetError
from training.datasets.csv_list import load_csv_list
from training.datasets.samples import Sample

HEADER = "category,split,label,image,mask"


def write_list(folder: Path, *lines: str, header: str = HEADER) -> Path:
    file = folder / "parts.csv"
    file.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return file


def test_rows_become_sorted_samples_with_paths_beside_the_file(tmp_path: Path) -> None:
    file = write_list(
        tmp_path,
        "can,train,0,b.png,",
        "can,train,Normal,a.png,",
        "can,test,scratch,sub/2.png,masks/2.png",
        "can,test,dent,sub/3.png,",
        "can,test,good,sub/1.png,masks/1.png",
    )
    (can,) = load_csv_list(file)
    assert can.train == (tmp_path / "a.png", tmp_path / "b.png")
    assert can.test == (
        Sample(tmp_path / "sub/3.png", anomalous=True, defect="dent", mask=None),
        Sample(tmp_path / "sub/1.png", anomalous=False, defect="good", mask=None),
        Sample(tmp_path / "sub/2.png", anomalous=True, defect="scratch", mask=tmp_path / "masks/2.png"),
    )


def test_mask_column_may_be_missing_and_further_columns_are_passed_over(tmp_path: Path) -> None:
    file = write_list(tmp_path, "x,1.png,can,dent,test", header="camera,image,category,label,split")
    assert load_csv_list(file)[0].test == (Sample(tmp_path / "1.png", anomalous=True, defect="dent", mask=None),)


def test_byte_order_mark_and_quotes_of_spreadsheets_are_understood(tmp_path: Path) -> None:
    file = tmp_path / "parts.csv"
    file.write_bytes(b'\xef\xbb\xbfcategory,split,label,image,mask\r\n"can","train","good","a, b.png",""\r\n')
    assert load_csv_list(file)[0].train == (tmp_path / "a, b.png",)


def test_names_of_any_bytes_are_read_and_labels_shown_escaped(tmp_path: Path) -> None:
    file = tmp_path / "parts.csv"
    file.write_bytes(b"category,split,label,image\ncan,train,good,gut_\xfc.png\ncan,test,gro\xdf,schlecht_\xfc.png\n")
    (data,) = load_csv_list(file)
    assert [os.fsencode(path.name) for path in data.images()] == [b"gut_\xfc.png", b"schlecht_\xfc.png"]
    assert data.test[0].defect == r"gro\udcdf"


def test_absolute_paths_stay(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "1.png"
    assert load_csv_list(write_list(tmp_path, f"can,train,good,{elsewhere},"))[0].train == (elsewhere,)


def test_only_the_categories_asked_for_are_read(tmp_path: Path) -> None:
    file = write_list(tmp_path, "can,train,good,1.png,", "lid,train,good,2.png,", "my can,train,good,3.png,")
    assert [data.name for data in load_csv_list(file, ["lid", "can"])] == ["lid", "can"]
    with pytest.raises(DatasetError, match=r"'my can' in .*parts\.csv is not a valid category name"):
        load_csv_list(file)


def test_defective_image_that_would_train_is_refused(tmp_path: Path) -> None:
    file = write_list(tmp_path, "can,train,good,1.png,", "can,train,dent,2.png,")
    with pytest.raises(DatasetError, match=r"line 3: only normal images can train, but the label is 'dent'"):
        load_csv_list(file)


def test_all_wrong_lines_are_counted_and_the_first_are_told(tmp_path: Path) -> None:
    file = write_list(
        tmp_path, "can,valid,good,1.png,", ",train,good,1.png,", "can,test,,1.png,", "can,test,dent,,", *["can"] * 3
    )
    with pytest.raises(DatasetError) as refused:
        load_csv_list(file)
    told = str(refused.value)
    assert "has 7 invalid lines" in told
    assert "line 2: split is 'valid', but must be train or test" in told
    assert "line 3: category must not be empty" in told
    assert "line 4: label must not be empty" in told
    assert "line 5: image must not be empty" in told
    assert "and 2 more lines" in told


@pytest.mark.parametrize("header", ["category;split;label;image;mask", "category,split,image", ""])
def test_wrong_columns_are_refused_with_those_found_and_those_needed(tmp_path: Path, header: str) -> None:
    with pytest.raises(DatasetError, match=r"lacks the column .*label.* must have category, split, label, image"):
        load_csv_list(write_list(tmp_path, "x", header=header))


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "parts.csv"
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DatasetError, match="is not a CSV file in UTF-8"):
        load_csv_list(file)
    with pytest.raises(DatasetError, match="cannot be read"):
        load_csv_list(tmp_path / "none.csv")
