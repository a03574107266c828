"""How fast the engines are beside anomalib: the same weights, the same images, in one run, in turns.

    python -m bench.engine --peer-python .venv-anomalib/bin/python [--rounds 5]

ResNet18 FastFlow at 256 px, eight steps of 3x3 subnets at three stages, weights seeded and scattered as in
`bench.parity`. Both sides are given uint8 images and give float32 maps at the size of the image; converting,
normalising and upsampling are inside the time. Each of our engines has a process of its own, as in a service; anomalib
has one. Each turn lets every engine judge the same batch; medians are told. Beside the speed stands what it costs: the
largest difference of a map value to plain float32 torch, and how well the order of image scores is kept (Spearman's
coefficient). Ranges for int8 are taken from other images than those judged. What a service judges in int8 is what
training has proven: `training.int8`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bench.engine_ours import ENGINES, maps_of
from flawstream.engines.openvino.int8_graph import int8_pays
from flawstream.fastflow.anomalib import read_anomalib
from flawstream.fastflow.head import FoldedHead
from flawstream.fastflow.score import score_images
from schemas.settings import ModelSettings

BATCHES = (1, 8, 32)
RUNS = {1: 16, 8: 2, 32: 1}
"""Of one engine's turn, by batch."""
PAUSE_S = 0.5
BAR = {1: 1.5, 8: 1.5}
"""Best of ours over best of anomalib's."""
PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine, ours or theirs.

    Attributes:
        name: Engine and precision.
        ours: Whose.
        turn: Judges a batch of so many images so many times; gives the seconds of each.
        map_difference: Largest of a map value, in [-1, 0], to plain torch.
        rank: Spearman's coefficient of image scores to plain torch's.
        seconds: By batch, of all runs.
    """

    name: str
    ours: bool
    turn: Callable[[int, int], list[float]]
    map_difference: float
    rank: float | None
    seconds: dict[int, list[float]] = field(default_factory=lambda: {batch: [] for batch in BATCHES})

    def images_per_s(self, batch: int) -> float:
        """Take the median over the rounds."""
        return batch / float(np.median(self.seconds[batch]))


class Side:
    """A process that judges when asked over a pipe.

    Args:
        command: Its first answer is given when it is ready.

    Attributes:
        first: That answer.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own scripts
        self.first = self._answer()

    def turn(self, **asked: object) -> Callable[[int, int], list[float]]:
        """Give what has it judge.

        Args:
            asked: Said with every request.
        """

        def run(batch: int, runs: int) -> list[float]:
            assert self._process.stdin is not None  # noqa: S101 - Popen was given a pipe
            self._process.stdin.write(json.dumps({**asked, "batch": batch, "runs": runs}) + "\n")
            self._process.stdin.flush()
            seconds: list[float] = self._answer()["seconds"]
            return seconds

        return run

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - Popen was given a pipe
        line = self._process.stdout.readline()
        if not line:
            sys.exit("one side ended; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Reference:
    """What plain torch in float32 gives for the images that are judged.

    Args:
        folder: Has checkpoint.pt and images.npy.
    """

    def __init__(self, folder: Path) -> None:
        model = read_anomalib(folder / "checkpoint.pt")
        backbone = model.make_backbone()
        images, _ = np.split(np.load(folder / "images.npy"), 2)
        with torch.inference_mode():
            grids = [grid.numpy() for grid in FoldedHead(model.make_head(backbone))(backbone(torch.from_numpy(images)))]
        self._maps = maps_of(grids, backbone.spec.input_size)
        self._scores = score_images(grids, 0.03)

    def difference(self, maps: Path) -> float:
        """Compare the first maps."""
        theirs = np.load(maps)
        return float(np.abs(theirs - self._maps[: len(theirs)]).max())

    def rank(self, scores: Path) -> float:
        """Compare the order of image scores."""
        return float(spearmanr(np.load(scores), self._scores).statistic)


def take_turns(contenders: Sequence[Contender], rounds: int) -> None:
    """Let each judge each batch, again and again; the first round warms up and is not counted.

    Each turn begins with a pause, in which threads of the turn before stop waiting for work at full speed, and with a
    run that brings the engine back into the caches and is not counted.
    """
    for turn in range(rounds + 1):
        sys.stderr.write(f"round {turn} of {rounds}, load average {os.getloadavg()[0]:.1f}\n")
        for batch in BATCHES:
            for contender in contenders:
                time.sleep(PAUSE_S)
                _, *seconds = contender.turn(batch, 1 + RUNS[batch])
                if turn:
                    contender.seconds[batch] += seconds


def show(contenders: Sequence[Contender]) -> dict[int, float]:
    """Print the table and the last line; give best of ours over best of theirs by batch."""
    header = "".join(f"{f'batch {batch}':>10}" for batch in BATCHES)
    print(f"{'img/s':34}{header}{'map max|diff|':>15}{'rank':>9}")
    for one in contenders:
        speed = "".join(f"{one.images_per_s(batch):10.1f}" for batch in BATCHES)
        rank = "" if one.rank is None else f"{one.rank:9.4f}"
        whose = "flawstream" if one.ours else "anomalib"
        print(f"{f'{whose}, {one.name}':34}{speed}{one.map_difference:15.1e}{rank}")
    table = {
        ours: {
            one.name: {str(batch): round(one.images_per_s(batch), 2) for batch in BATCHES}
            for one in contenders
            if one.ours is ours
        }
        for ours in (True, False)
    }
    ratio = {
        batch: max(one.images_per_s(batch) for one in contenders if one.ours)
        / max(one.images_per_s(batch) for one in contenders if not one.ours)
        for batch in BATCHES
    }
    told = {str(batch): round(value, 3) for batch, value in ratio.items()}
    print(json.dumps({"bench": "engine", "ratio": told, "ours": table[True], "anomalib": table[False]}))
    return ratio


def main() -> None:
    """Measure, print, and fail where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of the environment that has anomalib.")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    settings = ModelSettings(preset="resnet18")
    configuration = {
        "backbone": settings.backbone,
        "input_size": settings.input_size,
        "flow_steps": settings.flow_steps,
        "conv3x3_only": settings.conv3x3_only,
        "hidden_ratio": settings.hidden_ratio,
    }
    engines = [name for name in ENGINES if int8_pays() or not name.endswith("int8")]
    with tempfile.TemporaryDirectory() as name:
        folder, most = Path(name), max(BATCHES)
        sys.stderr.write("making a model of anomalib's ...\n")
        subprocess.run(  # noqa: S603 - our own script
            [
                *(arguments.peer_python, "-W", "ignore", str(PEERS / "anomalib_maps.py")),
                *("--configuration", json.dumps(configuration), "--out", str(folder), "--images", str(2 * most)),
            ],
            check=True,
        )
        reference = Reference(folder)
        sides: list[Side] = []
        contenders: list[Contender] = []
        for engine in engines:
            sys.stderr.write(f"starting {engine} ...\n")
            sides.append(Side([sys.executable, "-W", "ignore", "-m", "bench.engine_ours", engine, str(folder)]))
            difference, rank = (
                reference.difference(folder / f"maps-{engine}.npy"),
                reference.rank(folder / f"scores-{engine}.npy"),
            )
            contenders.append(Contender(engine, ours=True, turn=sides[-1].turn(), map_difference=difference, rank=rank))
        sys.stderr.write("exporting it by anomalib's to_openvino ...\n")
        command = [arguments.peer_python, "-W", "ignore", str(PEERS / "anomalib_engine.py"), "--folder", str(folder)]
        command += ["--configuration", json.dumps(configuration), "--threads", str(threads)]
        sides.append(Side(command))
        for how, label in (("torch", "torch eager"), ("openvino", f"to_openvino, {sides[-1].first['precision']}")):
            difference = reference.difference(folder / f"maps-{how}.npy")
            turn = sides[-1].turn(how=how)
            contenders.append(Contender(label, ours=False, turn=turn, map_difference=difference, rank=None))
        take_turns(contenders, arguments.rounds)
        for side in sides:
            side.close()
    ratio = show(contenders)
    missed = [f"{ratio[batch]:.2f} at batch {batch}" for batch, bar in BAR.items() if ratio[batch] < bar]
    if missed:
        sys.exit(f"best of ours over best of anomalib's is below 1.5: {', '.join(missed)}")


if __name__ == "__main__":
    main()
