"""The folder layout of MVTec AD and MPDD, which is also that of one's own images.

    <root>/<category>/train/good/*.png                       normal images
    <root>/<category>/test/good/*.png                        normal images to test on (optional, as all below)
    <root>/<category>/test/<defect>/*.png                    defective images
    <root>/<category>/ground_truth/<defect>/<stem>_mask.png  where the defect is (or <stem>.png)

Source: Bergmann, Fauser, Sattlegger, Steger, MVTec AD (CVPR 2019); Jezek, Jonak, Burget, Dvorak, Skotak, Deep
learning-based defect detection of metal parts (ICUMT 2021). Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from training.datasets.samples import NORMAL, CategoryData
from training.datasets.train_test import is_train_test, load_train_test

MARK = "<category>/train/good/"


def is_mvtec(root: Path) -> bool:
    """Tell whether a folder is laid out so."""
    return is_train_test(root, NORMAL)


def load_mvtec(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Find the images of every category under a folder.

    Args:
        root: The folder of categories, or one category's own folder.
        categories: Those wanted; absent: all.

    Returns:
        One item a category, by name, or in the order asked for.

    Raises:
        DatasetError: No category, an unknown one, a name that cannot be a category's, or a folder that cannot be read.
    """
    return load_train_test(root, categories, NORMAL)
