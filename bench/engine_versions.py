"""The versions that `bench.engine` measures, made by the code that makes a user's.

`training.pipeline`, which `flawstream train` runs under Ray, trains one on solar cells, for one epoch on few images:
speed does not depend on how well a flow was trained, and int8 is tried and proven as always. `flawstream models
import-anomalib` imports the other.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from bench.engine_ours import TOP_FRACTION, maps_of
from bench.verdicts import weights_of, write_cut
from flawstream.engines.choose import make_local_engine
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.score import score_images
from flawstream.imaging.decode import decode_image
from flawstream.imaging.pixels import PixelForm
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from flawstream.registry.versions import open_backbone
from schemas.manifest import ModelManifest
from schemas.presets import PresetName
from schemas.settings import BackboneArithmetic, DetectorSettings, LimitSettings, ModelSettings, TrainingSettings
from training.datasets.elpv import export_elpv
from training.datasets.mvtec import load_mvtec
from training.datasets.samples import CategoryData
from training.pipeline import TrainingJob, run_job
from training.steps.features import FeatureExtractor

CATEGORY = "mono"
EPOCHS = 1
TRAIN_IMAGES = 110
"""A fifth is held out: 22, and int8 is proven on 20 or more."""
TEST_IMAGES = 8
"""Of each class, at least."""


@dataclass(frozen=True, slots=True)
class Version:
    """The current version of `CATEGORY` in a registry of its own.

    Attributes:
        root: The registry.
        weights: Where its backbone's weights are, as `model.weights` has it.
    """

    root: Path
    weights: str


@dataclass(frozen=True, slots=True)
class Cells:
    """Photographs of solar cells.

    Attributes:
        folder: The data set, cut to few images, as `flawstream train` takes it.
        judged: Files of the test set that engines are timed on.
    """

    folder: Path
    judged: list[Path]

    @property
    def normal(self) -> Path:
        """Give the folder of normal images."""
        return self.folder / CATEGORY / "train" / "good"

    def pixels(self, side: int) -> NDArray[np.uint8]:
        """Decode what is judged, as a worker does.

        Args:
            side: Pixels.

        Returns:
            (N, side, side, 3).
        """
        images = [decode_image(path.read_bytes(), PixelForm(side), LimitSettings()).pixels for path in self.judged]
        return np.stack(images).astype(np.uint8)


def write_cells(folder: Path, judged: int) -> Cells:
    """Write the data set.

    Args:
        folder: Where to.
        judged: How many images are to be judged.
    """
    (whole,) = load_mvtec(export_elpv(folder / "elpv"), [CATEGORY])
    write_cut(whole, folder / "data", TRAIN_IMAGES, 0, TEST_IMAGES)
    rows = np.linspace(0, len(whole.test) - 1, judged).round().astype(int)
    return Cells(folder / "data", [whole.test[row].path for row in rows])


def train(preset: PresetName, arithmetic: BackboneArithmetic, cells: Cells, folder: Path) -> Version:
    """Train a version in a process of its own; a preset whose weights no package has gets random ones."""
    version = Version(folder / "trained", weights_of(preset, folder))
    _run({}, "bench.engine_versions", preset, arithmetic, version.weights, cells.folder, version.root)
    return version


def main(preset: str, arithmetic: str, weights: str, data: str, root: str) -> None:
    """Train, publish and promote a version."""
    (category,) = load_mvtec(Path(data))
    model = ModelSettings.model_validate({"preset": preset, "arithmetic": arithmetic, "weights": weights})
    train_here(category, model, TrainingSettings(epochs=EPOCHS), root)


def train_here(data: CategoryData, model: ModelSettings, recipe: TrainingSettings, root: str) -> ModelManifest:
    """Train, publish and promote a version in this process, on the engine that serves."""
    backbone = Backbone(model)
    engine = make_local_engine(DetectorSettings(), lambda: backbone)
    job = TrainingJob(data, model, recipe, root)
    *_, last = run_job(job, FeatureExtractor(backbone, LimitSettings()), engine)
    assert last.manifest is not None  # noqa: S101 - a job ends with it or raises
    Registry(root).promote(data.name, last.manifest.version)
    return last.manifest


def import_checkpoint(checkpoint: Path, cells: Cells, folder: Path) -> Version:
    """Import a model of anomalib's, with images resized as for a version trained here."""
    root = folder / "imported"
    said = ("--category", CATEGORY, "--data", cells.normal, "--resize", "area", "--promote")
    registry = {"FLAWSTREAM_REGISTRY__ROOT": str(root)}
    _run(registry, "flawstream_cli", "models", "import-anomalib", checkpoint, *said)
    return Version(root, "auto")


def _run(settings: Mapping[str, str], module: str, *arguments: object) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLAWSTREAM_")}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    ran = subprocess.run(command, check=False, env=environment | dict(settings), capture_output=True, text=True)  # noqa: S603 - our own interpreter
    if ran.returncode:
        sys.exit(f"{' '.join(command[2:])} ended with {ran.returncode}:\n{ran.stderr}")


class Reference:
    """What plain torch in float32 gives for the images that are judged.

    Args:
        version: Of which.
        images: (N, S, S, 3) uint8.
    """

    def __init__(self, version: Version, images: NDArray[np.uint8]) -> None:
        registry = Registry(str(version.root))
        manifest = registry.manifest(CATEGORY, registry.current(CATEGORY) or "")
        backbone = open_backbone(registry, manifest, ModelSettings(weights=version.weights))
        weights = registry.read_file(manifest, WEIGHTS_FILE)
        head = FoldedHead(FastFlowHead.from_bytes(weights, manifest.backbone, manifest.flow))
        with torch.inference_mode():
            grids = [grid.numpy() for grid in head(backbone(torch.from_numpy(images)))]
        self._maps = maps_of(grids, manifest.backbone.input_size)
        self._scores = score_images(grids, TOP_FRACTION)

    def difference(self, maps: Path) -> float:
        """Find the largest difference of a map value; there may be maps of the first images alone."""
        found = np.load(maps)
        return float(np.abs(found - self._maps[: len(found)]).max())

    def rank(self, scores: Path) -> float:
        """Compute Spearman's coefficient of image scores."""
        return float(spearmanr(np.load(scores), self._scores).statistic)


if __name__ == "__main__":
    main(*sys.argv[1:])
