"""The ELPV data set of solar cells as folders: real inspection images to try flawstream on, with no download.

The package `elpv-dataset` carries 2,624 photographs (electroluminescence, 300 x 300 pixels) of cells with the
probability of a defect, as experts saw it. Data: CC BY-NC-SA 4.0.

Source: Deitsch et al., Automatic classification of defective photovoltaic module cells in electroluminescence images,
Solar Energy 185 (2019). The split is ours: the data set has none for anomaly detection.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

from schemas.errors import ConfigError
from training.datasets.export import export_whole
from training.datasets.samples import NORMAL, split_normal

CATEGORIES = ("mono", "poly")
_TRAIN_SHARE = 0.7
_NEEDED_MB = 100


def export_elpv(target: Path) -> Path:
    """Write the cells as MVTec AD folders, once: whole or not at all, and a second call does nothing.

    Functional cells train (70 %) and test, certainly defective ones test; the doubtful between are left out.

    Args:
        target: The folder to make, with the categories `mono` and `poly`.

    Returns:
        The target.

    Raises:
        ConfigError: The package is not installed.
        DatasetError: The target holds something else, or cannot be written.
    """
    return export_whole(target, lambda folder: _build(_package_data(), folder), _is_complete, _NEEDED_MB)


def _is_complete(target: Path) -> bool:
    return all((target / category / "train" / NORMAL).is_dir() for category in CATEGORIES)


def _package_data() -> Path:
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise ConfigError("the package elpv-dataset is not installed; pip install 'flawstream[demo]'")
    return Path(spec.origin).parent / "data"


def _build(source: Path, folder: Path) -> None:
    cells: dict[tuple[str, str], list[str]] = {}
    for line in (source / "labels.csv").read_text(encoding="ascii").splitlines():
        name, probability, kind = line.split()
        cells.setdefault((kind, probability), []).append(name)
    for category in CATEGORIES:
        trained, tested = split_normal(cells[category, "0.0"], _TRAIN_SHARE)
        _copy(source, trained, folder / category / "train" / NORMAL)
        _copy(source, tested, folder / category / "test" / NORMAL)
        _copy(source, cells[category, "1.0"], folder / category / "test" / "defective")


def _copy(source: Path, names: list[str], folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, folder / Path(name).name)
