"""VisA, the visual anomaly data set, in the form of its original release; the split is that of its file `1cls.csv`.

    <root>/<category>/Data/Images/Normal/*.JPG      normal images, for training and testing
    <root>/<category>/Data/Images/Anomaly/*.JPG     defective images
    <root>/<category>/Data/Masks/Anomaly/*.png      where the defect is
    <root>/split_csv/1cls.csv                       object,split,label,image,mask

Source: Zou, Jeong, Pemula, Zhang, Dabeer, SPot-the-Difference (ECCV 2022). Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from schemas.errors import DatasetError
from training.datasets.csv_list import read_list
from training.datasets.folders import list_folders
from training.datasets.samples import CategoryData

MARK = "split_csv/1cls.csv beside <category>/Data/Images/Normal/"
_SPLIT = Path("split_csv", "1cls.csv")
_NORMAL = Path("Data", "Images", "Normal")


def is_visa(root: Path) -> bool:
    """Tell whether a folder is laid out so, be it without its split."""
    return (root / _SPLIT).is_file() or any((folder / _NORMAL).is_dir() for folder in list_folders(root))


def load_visa(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Find the images of every category; the one kind of defect is called `anomaly`.

    Args:
        root: The folder that holds `split_csv` and the categories.
        categories: Those wanted; absent: all.

    Returns:
        One item a category, by name, or in the order asked for.

    Raises:
        DatasetError: The split is missing or wrong, no category or not the one asked for.
    """
    split = root / _SPLIT
    if not split.is_file():
        raise DatasetError(
            f"{split} is missing, and it says which images of VisA train; it comes in the same archive: extract it all"
        )
    return read_list(split, root, categories, category_column="object")
