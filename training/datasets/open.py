"""Opening of data sets of any layout. Knows the markers by which layouts are recognised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from schemas.errors import DatasetError
from training.datasets import btad, cifar10, csv_list, magnetic_tile, mvtec, visa
from training.datasets.samples import CategoryData
from training.datasets.storage import is_url, list_once, open_path


class DatasetLayout(StrEnum):
    """The layout of a data set on disk."""

    AUTO = "auto"
    MVTEC = "mvtec"
    VISA = "visa"
    BTAD = "btad"
    MAGNETIC_TILE = "magnetic-tile"
    CSV = "csv"


@dataclass(frozen=True, slots=True)
class _Adapter:
    """Functions of one layout.

    Attributes:
        marker: Description of the path that `recognises` looks for.
        recognises: Checks whether a path has the layout.
        load: Finds the images.
    """

    marker: str
    recognises: Callable[[Path], bool]
    load: Callable[[Path, Sequence[str] | None], list[CategoryData]]


_ADAPTERS = {
    DatasetLayout.MVTEC: _Adapter(mvtec.MARKER, mvtec.is_mvtec, mvtec.load_mvtec),
    DatasetLayout.VISA: _Adapter(visa.MARKER, visa.is_visa, visa.load_visa),
    DatasetLayout.BTAD: _Adapter(btad.MARKER, btad.is_btad, btad.load_btad),
    DatasetLayout.MAGNETIC_TILE: _Adapter(
        magnetic_tile.MARKER, magnetic_tile.is_magnetic_tile, magnetic_tile.load_magnetic_tile
    ),
    DatasetLayout.CSV: _Adapter(csv_list.MARKER, csv_list.is_csv_list, csv_list.load_csv_list),
}


def open_dataset(
    root: str | Path, categories: Sequence[str] | None = None, layout: DatasetLayout = DatasetLayout.AUTO
) -> list[CategoryData]:
    """Find the images of every category of a data set. `training.datasets.check` checks them.

    Args:
        root: The folder or the CSV file, as a path or a URL that fsspec knows, for example `s3://bucket/mvtec`.
        categories: Names of categories; None: all.
        layout: `auto` recognises the layout by its marker.

    Returns:
        One item per category, in the order of `categories`, else by name.

    Raises:
        DatasetError: The path does not exist, has no or several layouts, or is a data set that must be exported first;
            there is no category, or one is unknown or has an invalid name; a list has invalid lines; or the storage
            of a URL fails.
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """
    path = open_path(root)
    list_once(path)
    if not is_url(path) and not path.exists():
        raise DatasetError(f"{path} does not exist; give the data set's folder or its CSV file")
    adapter = _ADAPTERS[_recognise(path) if layout is DatasetLayout.AUTO else layout]
    if not adapter.recognises(path):
        raise DatasetError(f"{path} is not a data set of layout {layout}; looked for {adapter.marker}")
    return adapter.load(path, categories)


def _recognise(root: Path) -> DatasetLayout:
    matching = [layout for layout, adapter in _ADAPTERS.items() if adapter.recognises(root)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise DatasetError(f"{root} could be {' or '.join(matching)}; choose with --layout")
    if cifar10.is_cifar10(root):
        cifar10.find_records(root)
        raise DatasetError(
            f"{root} is CIFAR-10 as binary records, but training reads image files; export them once with "
            f"`flawstream datasets export cifar10 TARGET --source {root}` and use TARGET instead"
        )
    markers = "; ".join(f"{layout}: {adapter.marker}" for layout, adapter in _ADAPTERS.items())
    raise DatasetError(
        f"{root} has no category of a known layout; looked for {markers}. Arrange the images in one of these layouts, "
        "or choose it with --layout"
    )
