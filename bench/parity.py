"""Whether a model of anomalib's, imported, gives anomalib's own anomaly maps: the real networks, weights seeded.

    python -m bench.parity --peer-python .venv-anomalib/bin/python [--quick]

Each configuration is built and run in anomalib's environment, and its checkpoint read here by what
`flawstream models import-anomalib` calls. Maps are compared of the same pixels, and of JPEG and PNG files: anomalib
reads and resizes those by itself, and here they go the whole way, from the import to the detector's grids, once with
each resize. The weights are random and moved far from where they start: pretrained ones need a model hub. How much the
maps vary stands beside the difference, so that the comparison cannot pass on nothing.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawstream.fastflow.anomalib import read_anomalib
from flawstream.fastflow.head import FoldedHead
from flawstream.fastflow.score import likelihood_map
from flawstream.imaging.decode import decode_image
from flawstream.registry.registry import Registry
from schemas.presets import PRESETS, PresetName
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings, Resize
from serving.detector import make_detector
from training.imports import ImportJob, run_import
from workers.ports import Detection

LIMIT = 1e-4
"""Largest difference of a map value, of the same pixels; the paper's score lies between -1 and 0."""
FILES_LIMIT = 1e-3
"""The same of files, where images are resized as in anomalib: the detector's grids are float16."""
SMALLEST_DEVIATION = 0.01
"""Maps that vary less than this prove nothing."""
PEER = Path(__file__).parent / "peers" / "anomalib_maps.py"
CONFIGURATIONS: tuple[PresetName, ...] = ("resnet18", "deit", "wide_resnet50_2", "cait")
RESIZES: tuple[Resize, ...] = get_args(Resize)
QUICK = 2
CATEGORY = "parity"


@dataclass(frozen=True, slots=True)
class Compared:
    """One configuration.

    Attributes:
        name: The preset.
        max_abs_diff: Over all map values, of the same pixels.
        lowest: Of anomalib's map values.
        highest: The same.
        deviation: The same.
        of_files: By resize and file name, the largest difference of a map value.
    """

    name: str
    max_abs_diff: float
    lowest: float
    highest: float
    deviation: float
    of_files: dict[Resize, dict[str, float]]

    def worst_file(self, resize: Resize) -> float:
        """Return the largest difference over all files."""
        return max(self.of_files[resize].values())

    @property
    def passes(self) -> bool:
        """Tell whether the maps agree and say something."""
        return (
            self.max_abs_diff <= LIMIT
            and self.worst_file("antialias") <= FILES_LIMIT
            and self.deviation >= SMALLEST_DEVIATION
        )


def compare(preset: PresetName, peer_python: str, folder: Path) -> Compared:
    """Have anomalib build and run one configuration, import it, and run it here."""
    settings = ModelSettings(preset=preset)
    configuration = {
        "backbone": settings.backbone,
        "input_size": settings.input_size,
        "flow_steps": settings.flow_steps,
        "conv3x3_only": settings.conv3x3_only,
        "hidden_ratio": settings.hidden_ratio,
    }
    subprocess.run(  # noqa: S603 - our own script
        [peer_python, "-W", "ignore", str(PEER), "--configuration", json.dumps(configuration), "--out", str(folder)],
        check=True,
    )
    theirs = torch.from_numpy(np.load(folder / "maps.npy"))
    ours = map_pixels(settings, folder)
    return Compared(
        preset,
        float((ours - theirs).abs().max()),
        float(theirs.min()),
        float(theirs.max()),
        float(theirs.std()),
        {resize: compare_files(folder, resize) for resize in RESIZES},
    )


def map_pixels(settings: ModelSettings, folder: Path) -> Tensor:
    """Compute the (B, S, S) maps of the images that anomalib's were computed of, in plain torch."""
    model = read_anomalib(folder / "checkpoint.pt")
    found = (model.settings.backbone, model.settings.input_size, model.flow.steps)
    assert found == (settings.backbone, settings.input_size, settings.flow_steps), found  # noqa: S101 - a benchmark
    backbone = model.make_backbone()
    head = FoldedHead(model.make_head(backbone))
    with torch.inference_mode():
        grids = head(backbone(torch.from_numpy(np.load(folder / "images.npy"))))
        return likelihood_map(grids, (settings.input_size, settings.input_size))


def compare_files(folder: Path, resize: Resize) -> dict[str, float]:
    """Import the checkpoint and judge the files; give the largest difference of a map value by file."""
    paths = sorted((folder / "files").iterdir())
    normal = folder / f"normal-{resize}"
    normal.mkdir()
    shutil.copy(paths[0], normal)  # one image calibrates: no verdict is looked at
    root = str(folder / f"models-{resize}")
    checkpoint = folder / "checkpoint.pt"
    job = ImportJob(
        model=read_anomalib(checkpoint, resize=resize),
        checkpoint=checkpoint,
        category=CATEGORY,
        normal=normal,
        top_fraction=0.0,
        false_alarm_rate=0.5,
        limits=LimitSettings(),
        detector=DetectorSettings(precision="f32"),
        registry_root=root,
    )
    *_, last = run_import(job)
    assert last.manifest is not None  # noqa: S101 - an import ends with it or raises
    Registry(root).promote(CATEGORY, last.manifest.version)
    grids = asyncio.run(judge(root, paths))
    differences = {}
    for path, of_image, theirs in zip(paths, grids, np.load(folder / "file_maps.npy"), strict=True):
        ours = likelihood_map([torch.from_numpy(grid)[None].float() for grid in of_image], theirs.shape)[0].numpy()
        differences[path.name] = float(np.abs(ours - theirs).max())
    return differences


async def judge(root: str, paths: list[Path]) -> list[tuple[NDArray[np.float16], ...]]:
    """Have the detector judge files as a worker does; give each one's grids, as they stand in its result."""
    detector = make_detector(root, ModelSettings(), DetectorSettings(precision="f32"))
    await detector.start()
    (form,) = await detector.pixel_forms([CATEGORY])
    grids = []
    for path in paths:
        pixels = decode_image(path.read_bytes(), form, LimitSettings()).pixels
        (outcome,) = await detector.detect(pixels[np.newaxis], [CATEGORY])
        assert isinstance(outcome, Detection), outcome  # noqa: S101 - a benchmark
        grids.append(outcome.grids)
    await detector.stop()
    return grids


def show(results: list[Compared]) -> None:
    """Print the differences of the same pixels, then those of files, and all of them as JSON."""
    print(f"{'same pixels':18}{'max |diff|':>12}{'lowest':>10}{'highest':>10}{'std':>10}")
    for one in results:
        print(f"{one.name:18}{one.max_abs_diff:12.2e}{one.lowest:10.4f}{one.highest:10.4f}{one.deviation:10.4f}")
    for resize in RESIZES:
        print(f"{resize:18}" + "".join(f"{name:>16}" for name in results[0].of_files[resize]))
        for one in results:
            print(f"{one.name:18}" + "".join(f"{found:16.2e}" for found in one.of_files[resize].values()))
    print(
        json.dumps(
            {
                "bench": "parity",
                "max_abs_diff": {one.name: one.max_abs_diff for one in results},
                "max_abs_diff_of_files": {
                    resize: {one.name: one.worst_file(resize) for one in results} for resize in RESIZES
                },
            }
        )
    )


def main() -> None:
    """Compare all configurations, one at a time in memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of the environment that has anomalib.")
    parser.add_argument("--quick", action="store_true", help="ResNet18 and DeiT alone.")
    arguments = parser.parse_args()
    results = []
    for preset in CONFIGURATIONS[: QUICK if arguments.quick else None]:
        sys.stderr.write(f"{preset} ({PRESETS[preset].fields['backbone']}) ...\n")
        with tempfile.TemporaryDirectory() as folder:
            results.append(compare(preset, arguments.peer_python, Path(folder)))
    show(results)
    if not all(one.passes for one in results):
        sys.exit(
            f"a difference above {LIMIT:g} of the same pixels or {FILES_LIMIT:g} of files, "
            f"or maps that vary less than {SMALLEST_DEVIATION:g}"
        )


if __name__ == "__main__":
    main()
