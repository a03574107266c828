"""Whether a model of anomalib's, imported, gives anomalib's own anomaly maps: the real networks, weights seeded.

    python -m bench.parity --peer-python .venv-anomalib/bin/python [--quick]

Each configuration is built and run in anomalib's environment, and its checkpoint read here by what
`flawstream models import-anomalib` calls. The weights are random and moved far from where they start: pretrained ones
need a model hub. How much the maps vary stands beside the difference, so that the comparison cannot pass on nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flawstream.fastflow.anomalib import read_anomalib
from flawstream.fastflow.head import FoldedHead
from flawstream.fastflow.score import likelihood_map
from schemas.presets import PRESETS, PresetName
from schemas.settings import ModelSettings

LIMIT = 1e-4
"""Largest difference of a map value; the paper's score lies between -1 and 0."""
SMALLEST_DEVIATION = 0.01
"""Maps that vary less than this prove nothing."""
PEER = Path(__file__).parent / "peers" / "anomalib_maps.py"
CONFIGURATIONS: tuple[PresetName, ...] = ("resnet18", "deit", "wide_resnet50_2", "cait")
QUICK = 2


@dataclass(frozen=True, slots=True)
class Compared:
    """One configuration.

    Attributes:
        name: The preset.
        max_abs_diff: Over all map values.
        lowest: Of anomalib's map values.
        highest: The same.
        deviation: The same.
    """

    name: str
    max_abs_diff: float
    lowest: float
    highest: float
    deviation: float

    @property
    def passes(self) -> bool:
        """Tell whether the maps agree and say something."""
        return self.max_abs_diff <= LIMIT and self.deviation >= SMALLEST_DEVIATION


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
    model = read_anomalib(folder / "checkpoint.pt")
    found = (model.settings.backbone, model.settings.input_size, model.flow.steps)
    assert found == (settings.backbone, settings.input_size, settings.flow_steps), found  # noqa: S101 - a benchmark
    backbone = model.make_backbone()
    head = FoldedHead(model.make_head(backbone))
    with torch.inference_mode():
        grids = head(backbone(torch.from_numpy(np.load(folder / "images.npy"))))
        ours = likelihood_map(grids, (settings.input_size, settings.input_size))
    return Compared(
        preset,
        float((ours - theirs).abs().max()),
        float(theirs.min()),
        float(theirs.max()),
        float(theirs.std()),
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
    print(f"{'':18}{'max |diff|':>12}{'lowest':>10}{'highest':>10}{'std':>10}")
    for one in results:
        print(f"{one.name:18}{one.max_abs_diff:12.2e}{one.lowest:10.4f}{one.highest:10.4f}{one.deviation:10.4f}")
    print(json.dumps({"bench": "parity", "max_abs_diff": {one.name: one.max_abs_diff for one in results}}))
    if not all(one.passes for one in results):
        sys.exit(f"a difference above {LIMIT:g}, or maps that vary less than {SMALLEST_DEVIATION:g}")


if __name__ == "__main__":
    main()
