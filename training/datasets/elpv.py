"""The ELPV data set of solar cells as folders: real inspection images to try flawstream on, with no download.

The package `elpv-dataset` carries 2,624 photographs (electroluminescence, 300 x 300 pixels) of cells with the
probability of a defect, as experts saw it. Data: CC BY-NC-SA 4.0.

Source: Deitsch et al., Automatic classification of defective photovoltaic module cells in electroluminescence images,
Solar Energy 185 (2019). The split is ours: the data set has none for anomaly detection.
"""

import random
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from schemas.errors import ConfigError, DatasetError
from training.datasets.samples import NORMAL

CATEGORIES = ("mono", "poly")
_TRAIN_SHARE = 0.7
_SEED = 0


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
    if _is_complete(target):
        return target
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DatasetError(f"{target} exists and holds something else than this data set; name a new folder")
    source = _package_data()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as unfinished:
            built = Path(unfinished) / target.name
            _build(source, built)
            built.replace(target)
    except OSError as error:
        if _is_complete(target):  # another process was quicker
            return target
        raise DatasetError(
            f"{target} cannot be written: {error}; name a folder on a disk with 100 MB to spare"
        ) from error
    return target


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
        functional = sorted(cells[category, "0.0"])
        random.Random(_SEED).shuffle(functional)  # noqa: S311 - a split that all repeat, not a secret
        split = round(_TRAIN_SHARE * len(functional))
        _copy(source, functional[:split], folder / category / "train" / NORMAL)
        _copy(source, functional[split:], folder / category / "test" / NORMAL)
        _copy(source, cells[category, "1.0"], folder / category / "test" / "defective")


def _copy(source: Path, names: list[str], folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, folder / Path(name).name)
