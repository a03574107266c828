"""The one way from a folder to a data set, whatever its layout. Knows the layouts and their marks, not their insides."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from training.datasets.mvtec import load_mvtec
from training.datasets.samples import CategoryData


class Layout(StrEnum):
    """How a data set lies on disk."""

    AUTO = "auto"
    MVTEC = "mvtec"


def open_dataset(
    root: Path, categories: Sequence[str] | None = None, layout: Layout = Layout.AUTO
) -> list[CategoryData]:
    """Find the images of every category of a data set.

    Args:
        root: Where it lies.
        categories: Those wanted; absent: all.
        layout: How it lies there; `auto` looks.

    Returns:
        One item a category, by name, or in the order asked for.

    Raises:
        DatasetError: No such data set or no category in it, an unknown category, or a name that cannot be a category's.
    """
    del layout
    return load_mvtec(root, categories)
