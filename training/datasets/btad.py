"""The folder layout of BTAD, the beanTech data set: MVTec AD's tree with other names.

    <root>/01/train/ok/*.bmp           normal images
    <root>/01/test/ok/*.bmp            normal images to test on
    <root>/01/test/ko/*.bmp            defective images
    <root>/01/ground_truth/ko/*.png    where the defect is, by the image's name; bmp in some categories

Source: Mishra, Verk, Fornasier, Piciarelli, Foresti, VT-ADL (ISIE 2021). Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from training.datasets.samples import CategoryData
from training.datasets.train_test import is_train_test, load_train_test

MARK = "<category>/train/ok/"
_NORMAL = "ok"


def is_btad(root: Path) -> bool:
    """Tell whether a folder is laid out so."""
    return is_train_test(root, _NORMAL)


def load_btad(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Find the images of every category under a folder; the one kind of defect is called `ko`.

    Args:
        root: The folder of categories, or one category's own folder.
        categories: Those wanted; absent: all.

    Returns:
        One item a category, by name, or in the order asked for.

    Raises:
        DatasetError: No category, an unknown one, a name that cannot be a category's, or a folder that cannot be read.
    """
    return load_train_test(root, categories, _NORMAL)
