"""Export of the ELPV data set of solar cells as folders: real inspection images that need no download.

The package `elpv-dataset` has 2,624 electroluminescence images (300 x 300 pixels) of cells, labelled by experts with
the probability of a defect. Data: CC BY-NC-SA 4.0.

Source: Deitsch et al., Automatic classification of defective photovoltaic module cells in electroluminescence images,
Solar Energy 185 (2019). The data set has no split for anomaly detection; ours is by a fixed seed.
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
    """Write the cells as MVTec AD folders, atomically; a second call does nothing.

    Functional cells train (70 %) and test, defective cells test; cells with an uncertain label are left out.

    Args:
        target: The folder to create, with the categories `mono` and `poly`.

    Returns:
        The target.

    Raises:
        ConfigError: The package is not installed.
        DatasetError: The target has other content, or cannot be written.
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
        train, test = split_normal(cells[category, "0.0"], _TRAIN_SHARE)
        _copy(source, train, folder / category / "train" / NORMAL)
        _copy(source, test, folder / category / "test" / NORMAL)
        _copy(source, cells[category, "1.0"], folder / category / "test" / "defective")


def _copy(source: Path, names: list[str], folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, folder / Path(name).name)
