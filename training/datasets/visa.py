"""The layout of VisA, as released, with the split of its file `1cls.csv`.

    <root>/<category>/Data/Images/Normal/*.JPG      normal images, to train and test
    <root>/<category>/Data/Images/Anomaly/*.JPG     defective images
    <root>/<category>/Data/Masks/Anomaly/*.png      masks
    <root>/split_csv/1cls.csv                       object,split,label,image,mask

Source: Zou, Jeong, Pemula, Zhang, Dabeer, SPot-the-Difference (ECCV 2022). Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from schemas.errors import DatasetError
from training.datasets.csv_list import read_list
from training.datasets.folders import has_folder, list_folders
from training.datasets.samples import CategoryData

MARKER = "split_csv/1cls.csv beside <category>/Data/Images/Normal/"
_SPLIT = "split_csv/1cls.csv"
_NORMAL = ("Data", "Images", "Normal")


def is_visa(root: Path) -> bool:
    """Check whether a folder has this layout, with or without the split."""
    has_split = has_folder(root, "split_csv") and (root / _SPLIT).is_file()
    return has_split or any(has_folder(folder, *_NORMAL) for folder in list_folders(root))


def load_visa(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Find the images of every category. The only kind of defect is `anomaly`.

    Args:
        root: The folder of `split_csv` and the categories.
        categories: Names of categories; None: all.

    Returns:
        One item per category, in the order of `categories`, else by name.

    Raises:
        DatasetError: The split is missing or invalid, there is no category, or one is unknown.
    """
    split = root / _SPLIT
    if not split.is_file():
        raise DatasetError(
            f"{split} is missing, which splits VisA into training and test images; extract it from the same archive"
        )
    return read_list(split, root, categories, category_column="object")
