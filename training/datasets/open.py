"""The one way from a path to a data set, whatever its layout. Knows the layouts and their marks, not their insides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from schemas.errors import DatasetError
from training.datasets import btad, cifar10, csv_list, magnetic_tile, mvtec, visa
from training.datasets.samples import CategoryData


class Layout(StrEnum):
    """How a data set lies on disk."""

    AUTO = "auto"
    MVTEC = "mvtec"
    VISA = "visa"
    BTAD = "btad"
    MAGNETIC_TILE = "magnetic-tile"
    CSV = "csv"


@dataclass(frozen=True, slots=True)
class _Adapter:
    """How one layout is known and read.

    Attributes:
        mark: What is looked for, in words.
        recognises: Looks for it.
        load: Finds the images.
    """

    mark: str
    recognises: Callable[[Path], bool]
    load: Callable[[Path, Sequence[str] | None], list[CategoryData]]


_ADAPTERS = {
    Layout.MVTEC: _Adapter(mvtec.MARK, mvtec.is_mvtec, mvtec.load_mvtec),
    Layout.VISA: _Adapter(visa.MARK, visa.is_visa, visa.load_visa),
    Layout.BTAD: _Adapter(btad.MARK, btad.is_btad, btad.load_btad),
    Layout.MAGNETIC_TILE: _Adapter(
        magnetic_tile.MARK, magnetic_tile.is_magnetic_tile, magnetic_tile.load_magnetic_tile
    ),
    Layout.CSV: _Adapter(csv_list.MARK, csv_list.is_csv_list, csv_list.load_csv_list),
}


def open_dataset(
    root: Path, categories: Sequence[str] | None = None, layout: Layout = Layout.AUTO
) -> list[CategoryData]:
    """Find the images of every category of a data set. What is wrong with them is for `training.datasets.check`.

    Args:
        root: Its folder, or its CSV file.
        categories: Those wanted; absent: all.
        layout: How it lies there; `auto` looks for each layout's mark.

    Returns:
        One item a category, by name, or in the order asked for.

    Raises:
        DatasetError: Nothing there, no layout or several of them recognised, a data set that must be exported first, no
            category or not the one asked for, a name that cannot be a category's, or a list with wrong lines.
    """
    if not root.exists():
        raise DatasetError(f"{root} does not exist; name the data set's folder or its CSV file")
    adapter = _ADAPTERS[_recognise(root) if layout is Layout.AUTO else layout]
    if not adapter.recognises(root):
        raise DatasetError(f"{root} is no data set of layout {layout}; looked for {adapter.mark}")
    return adapter.load(root, categories)


def _recognise(root: Path) -> Layout:
    matching = [layout for layout, adapter in _ADAPTERS.items() if adapter.recognises(root)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise DatasetError(f"{root} could be {' or '.join(matching)}; say which with --layout")
    if cifar10.is_cifar10(root):
        cifar10.find_records(root)
        raise DatasetError(
            f"{root} is CIFAR-10 in records, and training reads image files; write them once with "
            f"`flawstream datasets export cifar10 TARGET --source {root}` and name TARGET instead"
        )
    marks = "; ".join(f"{layout}: {adapter.mark}" for layout, adapter in _ADAPTERS.items())
    raise DatasetError(
        f"{root} holds no category of a layout known here; looked for {marks}. Arrange the images as one of them, "
        "or say with --layout which one it is meant to be"
    )
