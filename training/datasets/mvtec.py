"""The folder layout of MVTec AD and MPDD, also used for users' own images.

    <root>/<category>/train/good/*.png                       normal images
    <root>/<category>/test/good/*.png                        normal test images (optional, as all below)
    <root>/<category>/test/<defect>/*.png                    defective images
    <root>/<category>/ground_truth/<defect>/<stem>_mask.png  masks (or <stem>.png)

Source: Bergmann, Fauser, Sattlegger, Steger, MVTec AD (CVPR 2019); Jezek, Jonak, Burget, Dvorak, Skotak, Deep
learning-based defect detection of metal parts (ICUMT 2021). Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from training.datasets.samples import NORMAL, CategoryData
from training.datasets.train_test import is_train_test, load_train_test

MARKER = "<category>/train/good/"


def is_mvtec(root: Path) -> bool:
    """Check whether a folder has this layout."""
    return is_train_test(root, NORMAL)


def load_mvtec(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Find the images of every category under a folder.

    Args:
        root: The folder of categories, or the folder of one category.
        categories: Names of categories; None: all.

    Returns:
        One item per category, in the order of `categories`, else by name.

    Raises:
        DatasetError: There is no category, one is unknown or has an invalid name, or a folder cannot be read.
    """
    return load_train_test(root, categories, NORMAL)
