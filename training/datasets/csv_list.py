"""A data set as a list: one CSV file with the path of every image.

    category,split,label,image,mask
    bottle,train,good,2026-01/0001.png,
    bottle,test,good,2026-02/0001.png,
    bottle,test,scratch,2026-02/0002.png,masks/0002.png

Paths are relative to the file. The labels `good`, `normal`, `ok` (in any case) and `0` mean normal, others name the
defect. `mask` may be empty or missing. Names of files may be any bytes. Does not check whether the
files exist, and decodes nothing.
"""

import codecs
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from schemas.errors import DatasetError, escaped
from training.datasets.folders import choose_categories
from training.datasets.samples import NORMAL, NORMAL_NAMES, CategoryData, Sample
from training.datasets.storage import read_file

MARKER = "a file *.csv"
_NORMAL_LABELS = NORMAL_NAMES | {"0"}
_MAX_ERRORS = 5
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_csv_list(root: Path) -> bool:
    """Check whether a path is such a list."""
    return root.suffix.lower() == ".csv" and root.is_file()


def load_csv_list(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Read the images of every category in a list.

    Args:
        root: The CSV file.
        categories: Names of categories; None: all.

    Returns:
        One item per category, in the order of `categories`, else by name.

    Raises:
        DatasetError: The file cannot be read, columns or rows are invalid, there is no category, or one is unknown.
    """
    return read_list(root, root.parent, categories, category_column="category")


def read_list(file: Path, base: Path, categories: Sequence[str] | None, *, category_column: str) -> list[CategoryData]:
    """Read a list whose columns are `split`, `label`, `image`, perhaps `mask`, and one that names the category.

    Args:
        file: The CSV file, UTF-8, with a header.
        base: The folder that its paths are relative to.
        categories: Names of categories; None: all.
        category_column: Name of the column of categories.

    Returns:
        One item per category, in the order of `categories`, else by name.

    Raises:
        DatasetError: The file cannot be read, columns or rows are invalid, there is no category, or one is unknown.
    """
    found: dict[str, _Category] = {}
    errors: list[str] = []
    for line, row in _rows(file, (category_column, "split", "label", "image")):
        if error := _add_row(row, base, category_column, found):
            errors.append(f"line {line}: {error}")
    if errors:
        more = f"; and {len(errors) - _MAX_ERRORS} more lines" if len(errors) > _MAX_ERRORS else ""
        raise DatasetError(
            f"{file} has {len(errors)} invalid lines: {'; '.join(errors[:_MAX_ERRORS])}{more}; correct them"
        )
    return [category.as_data(name) for name, category in choose_categories(file, found, categories).items()]


@dataclass(slots=True)
class _Category:
    train: list[Path] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)

    def as_data(self, name: str) -> CategoryData:
        test = sorted(self.test, key=lambda sample: (sample.defect, sample.path))
        return CategoryData(name, tuple(sorted(self.train)), tuple(test))


def _rows(file: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield rows with the number of their last line; missing cells are empty."""
    try:
        content = read_file(file)
        if content.startswith(_UTF16_MARKS):
            raise DatasetError(f"{file} is not a CSV file in UTF-8 but one in UTF-16; save it as UTF-8")
        with io.StringIO(content.decode("utf-8-sig", errors="surrogateescape"), newline="") as opened:
            reader = csv.DictReader(opened, restval="")
            missing = [name for name in required if name not in (reader.fieldnames or ())]
            if missing:
                raise DatasetError(
                    f"{file} lacks the column {', '.join(missing)}; its first line is "
                    f"{','.join(reader.fieldnames or ())!r} and must have {', '.join(required)} and optionally mask, "
                    "separated by commas"
                )
            for row in reader:
                yield reader.line_num, {name: (row.get(name) or "").strip() for name in (*required, "mask")}
    except csv.Error as error:
        raise DatasetError(f"{file} is not a CSV file ({error}); save it as one in UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}; check its name and permissions") from error


def _add_row(row: Mapping[str, str], base: Path, category_column: str, found: dict[str, _Category]) -> str | None:
    """Add one row to its category, or return an error text."""
    empty = [name for name in (category_column, "label", "image") if not row[name]]
    if empty:
        return f"{', '.join(empty)} must not be empty"
    path, label = base / row["image"], escaped(row["label"])
    normal = label.lower() in _NORMAL_LABELS
    category = found.setdefault(row[category_column], _Category())
    match row["split"].lower(), normal:
        case "train", True:
            category.train.append(path)
        case "train", False:
            return f"only normal images can train, but the label is {label!r}; move it to test"
        case "test", True:
            category.test.append(Sample(path, anomalous=False, defect=NORMAL, mask=None))
        case "test", False:
            mask = base / row["mask"] if row["mask"] else None
            category.test.append(Sample(path, anomalous=True, defect=label, mask=mask))
        case _:
            return f"split is {row['split']!r}, but must be train or test"
    return None
