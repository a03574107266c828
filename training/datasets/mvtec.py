"""The folder layout of MVTec AD, MVTec LOCO, MVTec AD 2 and MPDD, also used for users' own images.

    <root>/<category>/train/good/*.png                       normal images
    <root>/<category>/test/good/*.png                        normal test images (optional, as all below)
    <root>/<category>/test/<defect>/*.png                    defective images
    <root>/<category>/ground_truth/<defect>/<stem>_mask.png  masks (or <stem>.png)

MVTec LOCO has `validation/good` too, and for each image a folder `ground_truth/<defect>/<stem>` of masks. MVTec AD 2
has `validation/good`, and `test_public` with its own `ground_truth`.

Source: Bergmann, Fauser, Sattlegger, Steger, MVTec AD (CVPR 2019); Jezek, Jonak, Burget, Dvorak, Skotak, Deep
learning-based defect detection of metal parts (ICUMT 2021). Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from training.datasets.btad import is_ok
from training.datasets.folders import is_normal
from training.datasets.samples import CategoryData
from training.datasets.train_test import is_train_test, load_train_test

MARKER = "<category>/train/good/ (or normal, Good, OK, ...)"


def is_mvtec(root: Path) -> bool:
    """Check whether a folder has this layout."""
    return is_train_test(root, _is_marker)


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
    return load_train_test(root, categories, _is_marker)


def _is_marker(name: str) -> bool:
    return is_normal(name) and not is_ok(name)
