"""A data set as a list: one CSV file that names every image, wherever the images lie.

    category,split,label,image,mask
    bottle,train,good,2026-01/0001.png,
    bottle,test,good,2026-02/0001.png,
    bottle,test,scratch,2026-02/0002.png,masks/0002.png

Paths are relative to the file. The labels `good`, `normal` and `0` mean normal, any other is the defect's name; `mask`
may be empty or missing. Whether the files exist is not looked at, and nothing is decoded.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from schemas.errors import DatasetError
from training.datasets.folders import choose_categories
from training.datasets.samples import NORMAL, CategoryData, Sample

MARK = "a file *.csv"
_NORMAL_LABELS = frozenset({NORMAL, "normal", "0"})
_SHOWN = 5


def is_csv_list(root: Path) -> bool:
    """Tell whether this is such a list."""
    return root.suffix.lower() == ".csv" and root.is_file()


def load_csv_list(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Read the images of every category in a list.

    Args:
        root: The CSV file.
        categories: Those wanted; absent: all.

    Returns:
        One item a category, by name, or in the order asked for.

    Raises:
        DatasetError: The file cannot be read or has wrong columns or rows, no category or not the one asked for.
    """
    return read_list(root, root.parent, categories, category_column="category")


def read_list(file: Path, base: Path, categories: Sequence[str] | None, *, category_column: str) -> list[CategoryData]:
    """Read a list whose columns are `split`, `label`, `image`, perhaps `mask`, and one that names the category.

    Args:
        file: The CSV file, UTF-8, with a header.
        base: What its paths are relative to.
        categories: Those wanted; absent: all.
        category_column: Which column names the category.

    Returns:
        One item a category, by name, or in the order asked for.

    Raises:
        DatasetError: The file cannot be read or has wrong columns or rows, no category or not the one asked for.
    """
    found: dict[str, _Collected] = {}
    wrong: list[str] = []
    for line, row in _rows(file, (category_column, "split", "label", "image")):
        if reason := _collect(row, base, category_column, found):
            wrong.append(f"line {line}: {reason}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more lines" if len(wrong) > _SHOWN else ""
        raise DatasetError(f"{file} has {len(wrong)} wrong lines: {'; '.join(wrong[:_SHOWN])}{more}; correct them")
    return [one.as_data(name) for name, one in choose_categories(file, found, categories).items()]


@dataclass(slots=True)
class _Collected:
    train: list[Path] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)

    def as_data(self, name: str) -> CategoryData:
        test = sorted(self.test, key=lambda sample: (sample.defect, sample.path))
        return CategoryData(name, tuple(sorted(self.train)), tuple(test))


def _rows(file: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read rows with the number of their last line; a cell that is missing is empty."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, restval="")
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise DatasetError(
                    f"{file} lacks the column {', '.join(missing)}; its first line is "
                    f"{','.join(reader.fieldnames or ())!r} and must name {', '.join(needed)} and perhaps mask, with "
                    "commas between"
                )
            for row in reader:
                yield reader.line_num, {name: (row.get(name) or "").strip() for name in (*needed, "mask")}
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file} is no CSV file in UTF-8 ({error}); save it as such") from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}; check its name and permissions") from error


def _collect(row: Mapping[str, str], base: Path, category_column: str, found: dict[str, _Collected]) -> str | None:
    """Take one row, or say what is wrong with it."""
    empty = [name for name in (category_column, "label", "image") if not row[name]]
    if empty:
        return f"{', '.join(empty)} must not be empty"
    path, label = base / row["image"], row["label"]
    normal = label.lower() in _NORMAL_LABELS
    one = found.setdefault(row[category_column], _Collected())
    match row["split"].lower(), normal:
        case "train", True:
            one.train.append(path)
        case "train", False:
            return f"only normal images train, and the label is {label!r}; move it to test"
        case "test", True:
            one.test.append(Sample(path, anomalous=False, defect=NORMAL, mask=None))
        case "test", False:
            mask = base / row["mask"] if row["mask"] else None
            one.test.append(Sample(path, anomalous=True, defect=label, mask=mask))
        case _:
            return f"split is {row['split']!r} and must be train or test"
    return None
