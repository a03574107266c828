"""How fast the engines are beside anomalib: the same weights, the same images, in one run, in turns.

    python -m bench.engine --peer-python .venv-anomalib/bin/python [--rounds 5]

ResNet18 FastFlow at 256 px, eight steps of 3x3 subnets at three stages, weights seeded and scattered as in
`bench.parity`. Both sides are given uint8 images and give float32 maps at the size of the image; converting,
normalising and upsampling are inside the time. Each turn lets every engine judge the same batch; medians are told.
Beside the speed stands what it costs: the largest difference of a map value to plain float32 torch, and how well the
order of image scores is kept (Spearman's coefficient).
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
from numpy.typing import NDArray
from scipy.stats import spearmanr

from flawstream.fastflow.anomalib import AnomalibModel, read_anomalib
from flawstream.fastflow.head import FoldedHead
from flawstream.fastflow.score import image_scores, likelihood_map
from schemas.manifest import ModelManifest
from schemas.settings import ModelSettings
from serving.engines.engine import Engine
from serving.engines.ncnn_engine import NcnnEngine
from serving.engines.openvino_engine import OpenvinoEngine
from serving.engines.torch_engine import TorchEngine

BATCHES = (1, 8, 32)
RUNS = {1: 8, 8: 2, 32: 1}
"""Of one engine's turn, by batch."""
BAR = {1: 1.5, 8: 1.5}
"""Best of ours over best of anomalib's."""
PEERS = Path(__file__).parent / "peers"

Images = NDArray[np.uint8]
Grids = list[NDArray[np.float32]]


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


class Peer:
    """anomalib, in its own environment, answering over a pipe."""

    def __init__(self, python: str, folder: Path, configuration: dict[str, Any], threads: int) -> None:
        command = [python, "-W", "ignore", str(PEERS / "anomalib_engine.py"), "--folder", str(folder)]
        command += ["--configuration", json.dumps(configuration), "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own script
        self.precision = str(self._answer()["precision"])

    def turn(self, how: str) -> Callable[[int, int], list[float]]:
        """Give what has anomalib judge."""

        def run(batch: int, runs: int) -> list[float]:
            assert self.process.stdin is not None  # noqa: S101 - Popen was given a pipe
            self.process.stdin.write(json.dumps({"how": how, "batch": batch, "runs": runs}) + "\n")
            self.process.stdin.flush()
            seconds: list[float] = self._answer()["seconds"]
            return seconds

        return run

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101 - Popen was given a pipe
        line = self.process.stdout.readline()
        if not line:
            sys.exit("anomalib's side ended; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Ours:
    """Our engines on the imported checkpoint.

    Args:
        model: As read.
        images: Those to be judged.
    """

    def __init__(self, model: AnomalibModel, images: Images) -> None:
        self.images = images
        self._model = model
        backbone = model.make_backbone()
        self.head = model.make_head(backbone)
        self._side = backbone.spec.input_size
        with torch.inference_mode():
            self._exact = [grid.numpy() for grid in FoldedHead(self.head)(backbone(torch.from_numpy(images)))]
        said: dict[str, Any] = {"category": "bench", "version": "v1", "backbone": backbone.spec, "flow": model.flow}
        self._manifest = ModelManifest.model_construct(**said)

    def contenders(self) -> list[Contender]:
        """Start every engine."""
        return [
            self._contender(name, self._start(engine(self._model.make_backbone())))
            for name, engine in (("torch f32", TorchEngine), ("openvino f32", OpenvinoEngine), ("ncnn f32", NcnnEngine))
        ]

    def maps(self, grids: Grids) -> NDArray[np.float32]:
        """Compute what anomalib calls the anomaly map."""
        maps: NDArray[np.float32] = likelihood_map(
            [torch.from_numpy(grid) for grid in grids], (self._side, self._side)
        ).numpy()
        return maps

    def difference(self, maps: NDArray[np.float32]) -> float:
        """Compare the first maps with plain torch's."""
        return float(np.abs(maps - self.maps([grid[: len(maps)] for grid in self._exact])).max())

    def _start(self, engine: Engine) -> Callable[[Images], Grids]:
        loaded = engine.load(self.head, self._manifest)
        return lambda images: engine.detect(images, [(loaded, np.arange(len(images)))])

    def _contender(self, name: str, judge: Callable[[Images], Grids]) -> Contender:
        def turn(batch: int, runs: int) -> list[float]:
            seconds = []
            for _ in range(runs):
                started = time.perf_counter()
                self.maps(judge(self.images[:batch]))
                seconds.append(time.perf_counter() - started)
            return seconds

        grids = judge(self.images)
        rank = float(spearmanr(_scores(grids), _scores(self._exact)).statistic)
        return Contender(name, ours=True, turn=turn, map_difference=self.difference(self.maps(grids)), rank=rank)


def _scores(grids: Grids) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = image_scores([torch.from_numpy(grid) for grid in grids], 0.03).numpy()
    return scores


def take_turns(contenders: Sequence[Contender], rounds: int) -> None:
    """Let each judge each batch, again and again; the first round warms up and is not counted."""
    for turn in range(rounds + 1):
        sys.stderr.write(f"round {turn} of {rounds}, load average {os.getloadavg()[0]:.1f}\n")
        for batch in BATCHES:
            for contender in contenders:
                seconds = contender.turn(batch, RUNS[batch])
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
    with tempfile.TemporaryDirectory() as name:
        folder, most = Path(name), max(BATCHES)
        sys.stderr.write("making a model of anomalib's ...\n")
        subprocess.run(  # noqa: S603 - our own script
            [
                *(arguments.peer_python, "-W", "ignore", str(PEERS / "anomalib_maps.py")),
                *("--configuration", json.dumps(configuration), "--out", str(folder), "--images", str(most)),
            ],
            check=True,
        )
        images = np.load(folder / "images.npy")
        sys.stderr.write("exporting it by anomalib's to_openvino ...\n")
        peer = Peer(arguments.peer_python, folder, configuration, threads)
        sys.stderr.write("starting our engines ...\n")
        ours = Ours(read_anomalib(folder / "checkpoint.pt"), images)
        contenders = ours.contenders()
        for how, label in (("torch", "torch eager"), ("openvino", f"to_openvino, {peer.precision}")):
            difference = ours.difference(np.load(folder / f"maps-{how}.npy"))
            contenders.append(Contender(label, ours=False, turn=peer.turn(how), map_difference=difference, rank=None))
        take_turns(contenders, arguments.rounds)
        peer.close()
    ratio = show(contenders)
    missed = [f"{ratio[batch]:.2f} at batch {batch}" for batch, bar in BAR.items() if ratio[batch] < bar]
    if missed:
        sys.exit(f"best of ours over best of anomalib's is below 1.5: {', '.join(missed)}")


if __name__ == "__main__":
    main()
