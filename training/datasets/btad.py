"""The folder layout of BTAD, the beanTech data set: MVTec AD's tree with other names.

    <root>/01/train/ok/*.bmp           normal images
    <root>/01/test/ok/*.bmp            normal test images
    <root>/01/test/ko/*.bmp            defective images
    <root>/01/ground_truth/ko/*.png    masks, named as the images; bmp in some categories

Source: Mishra, Verk, Fornasier, Piciarelli, Foresti, VT-ADL (ISIE 2021). Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from training.datasets.samples import CategoryData
from training.datasets.train_test import is_train_test, load_train_test

MARKER = "<category>/train/ok/"
_NORMAL = "ok"


def is_btad(root: Path) -> bool:
    """Check whether a folder has this layout."""
    return is_train_test(root, is_ok)


def load_btad(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Find the images of every category under a folder. The only kind of defect is `ko`.

    Args:
        root: The folder of categories, or the folder of one category.
        categories: Names of categories; None: all.

    Returns:
        One item per category, in the order of `categories`, else by name.

    Raises:
        DatasetError: There is no category, one is unknown or has an invalid name, or a folder cannot be read.
    """
    return load_train_test(root, categories, is_ok)


def is_ok(name: str) -> bool:
    """Check whether a folder has the name by which this layout is recognised."""
    return name == _NORMAL
