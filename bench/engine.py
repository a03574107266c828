"""How fast the engines judge what `flawstream train` publishes, beside anomalib with the same backbone, in turns.

    python -m bench.engine --peer-python .venv-anomalib/bin/python [--rounds 5] [--presets resnet18] [--arithmetic int8]

For each preset a version is trained and published by `training.pipeline`, which `flawstream train` runs: one epoch on
few solar cells, as speed does not depend on how well it was trained. Each of our engines has a process of its own,
which loads the version as the detector does; `auto` is what serves it. anomalib has a process too: its own FastFlow
with the same backbone, feature scales and flow steps, in torch and exported by its `to_openvino` at its default
precision. For ResNet18 a model of anomalib's is imported as well, and judged by `auto`. Both sides are given the same
32 photographs as uint8 pixels and give float32 maps at the size of the image; converting, normalising and upsampling
are inside the time. Each turn lets every engine judge the same batch; figures are medians. Beside them stands what an
engine loses: the largest difference of a map value to plain float32 torch, and how well the order of image scores is
kept (Spearman's coefficient).

The last line is JSON. `ratio` is `auto` over the faster of anomalib's two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from bench.engine_versions import CATEGORY, Cells, Reference, Version, import_checkpoint, train, write_cells
from schemas.presets import PresetName
from schemas.settings import BackboneArithmetic, ModelSettings

PRESETS: tuple[PresetName, ...] = ("efficientnet_lite0", "resnet18")
IMPORTED: PresetName = "resnet18"
AUTO = ("auto", "auto")
ENGINES = (AUTO, ("ncnn", "f32"), ("openvino", "f32"), ("torch", "f32"))
"""Engine and precision; the first is what serves, and the others show what it is chosen from."""
BATCHES = (1, 8, 32)
RUNS = {1: 16, 8: 2, 32: 1}
"""Of one engine's turn, by batch."""
PAUSE_S = 0.5
PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine with one version, or anomalib.

    Attributes:
        kind: `trained`, `imported` or `anomalib`.
        name: Engine and arithmetic.
        serves: Whether it is what `auto` chose.
        turn: Judges a batch of so many images so many times; returns the seconds of each.
        map_difference: Largest of a map value, in [-1, 0], to plain torch; None where nothing has the same weights.
        rank: Spearman's coefficient of image scores to plain torch's.
        seconds: By batch, of all runs.
    """

    kind: str
    name: str
    serves: bool
    turn: Callable[[int, int], list[float]]
    map_difference: float | None = None
    rank: float | None = None
    seconds: dict[int, list[float]] = field(default_factory=lambda: {batch: [] for batch in BATCHES})

    @property
    def images_per_s(self) -> dict[int, float]:
        """Take the medians, by batch."""
        return {batch: batch / float(np.median(self.seconds[batch])) for batch in BATCHES}


@dataclass(frozen=True, slots=True)
class Compared:
    """What was measured with one backbone.

    Attributes:
        backbone: timm's name.
        contenders: All, measured.
    """

    backbone: str
    contenders: Sequence[Contender]

    def served(self, kind: str) -> Contender | None:
        """Find what `auto` serves a kind of version with."""
        return next((one for one in self.contenders if one.kind == kind and one.serves), None)

    @property
    def best_of_anomalib(self) -> dict[int, float]:
        """Take the faster of anomalib's two, by batch; img/s."""
        theirs = [one.images_per_s for one in self.contenders if one.kind == "anomalib"]
        return {batch: max(one[batch] for one in theirs) for batch in BATCHES}

    def ratio(self, kind: str) -> dict[int, float] | None:
        """Divide what serves a kind of version by the best of anomalib's."""
        ours = self.served(kind)
        if ours is None:
            return None
        return {batch: ours.images_per_s[batch] / self.best_of_anomalib[batch] for batch in BATCHES}


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
        """Return a function that has it judge.

        Args:
            asked: Part of every request.
        """

        def run(batch: int, runs: int) -> list[float]:
            assert self._process.stdin is not None  # noqa: S101 - Popen was given a pipe
            self._process.stdin.write(json.dumps({**asked, "batch": batch, "runs": runs}) + "\n")
            self._process.stdin.flush()
            seconds: list[float] = self._answer()["seconds"]
            return seconds

        return run

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - Popen was given a pipe
        line = self._process.stdout.readline()
        if not line:
            sys.exit("one side ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def take_turns(contenders: Sequence[Contender], rounds: int) -> None:
    """Let each judge each batch, again and again; the first round warms up and is not counted.

    Each turn begins with a pause, in which threads of the turn before stop waiting for work at full speed, and with a
    run that brings the engine back into the caches and is not counted.
    """
    for turn in range(rounds + 1):
        sys.stderr.write(f"  round {turn} of {rounds}, load average {os.getloadavg()[0]:.1f}\n")
        for batch in BATCHES:
            for contender in contenders:
                time.sleep(PAUSE_S)
                _, *seconds = contender.turn(batch, 1 + RUNS[batch])
                if turn:
                    contender.seconds[batch] += seconds


def compare(
    preset: PresetName, cells: Cells, folder: Path, peer_python: str, rounds: int, *, arithmetic: BackboneArithmetic
) -> Compared:
    """Make the versions of one preset and measure them beside anomalib.

    Args:
        preset: Which.
        cells: The images.
        folder: For everything that is made.
        peer_python: Python of the environment that has anomalib.
        rounds: How often each engine has its turn.
        arithmetic: Of the backbone of the version that is trained.
    """
    settings = ModelSettings(preset=preset)
    configuration = {
        "backbone": settings.backbone,
        "input_size": settings.input_size,
        "flow_steps": settings.flow_steps,
        "conv3x3_only": settings.conv3x3_only,
        "hidden_ratio": settings.hidden_ratio,
    }
    _note(f"{preset}: training a version ...")
    versions = {"trained": train(preset, arithmetic, cells, folder)}
    checkpoint = folder / "checkpoint.pt"
    if preset == IMPORTED:
        _note(f"{preset}: making a model of anomalib's and importing it ...")
        _run_peer(peer_python, "anomalib_maps.py", "--configuration", json.dumps(configuration), "--out", str(folder))
        versions["imported"] = import_checkpoint(checkpoint, cells, folder)
    images = cells.pixels(settings.input_size)
    np.save(folder / "images.npy", images)
    sides: list[Side] = []
    contenders: list[Contender] = []
    for kind, version in versions.items():
        reference = Reference(version, images)
        for engine, precision in ENGINES if kind == "trained" else (AUTO,):
            if any((one.kind, one.name) == (kind, f"{engine} float32") for one in contenders):
                continue  # it is what `auto` chose
            _note(f"{preset}: starting {engine} {precision} on the {kind} version ...")
            sides.append(_start_ours(version, engine, precision, folder))
            contenders.append(
                Contender(
                    kind,
                    f"{sides[-1].first['engine']} {sides[-1].first['arithmetic']}",
                    serves=engine == "auto",
                    turn=sides[-1].turn(),
                    map_difference=reference.difference(folder / "maps.npy"),
                    rank=reference.rank(folder / "scores.npy"),
                )
            )
    _note(f"{preset}: exporting anomalib's model by its to_openvino ...")
    command = [*_peer(peer_python, "anomalib_engine.py"), "--folder", str(folder)]
    command += ["--configuration", json.dumps(configuration | {"strides": settings.strides})]
    command += ["--threads", str(os.cpu_count() or 1)]
    sides.append(Side(command + (["--checkpoint", str(checkpoint)] if checkpoint.exists() else [])))
    for how, name in (("torch", "torch eager"), ("openvino", f"to_openvino {sides[-1].first['precision']}")):
        difference = reference.difference(folder / f"maps-{how}.npy") if "imported" in versions else None
        turn = sides[-1].turn(how=how)
        contenders.append(Contender("anomalib", name, serves=False, turn=turn, map_difference=difference))
    take_turns(contenders, rounds)
    for side in sides:
        side.close()
    return Compared(settings.backbone, contenders)


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


def _peer(python: str, script: str) -> list[str]:
    return [python, "-W", "ignore", str(PEERS / script)]


def _run_peer(python: str, script: str, *arguments: str) -> None:
    subprocess.run([*_peer(python, script), *arguments], check=True)  # noqa: S603 - our own script


def _start_ours(version: Version, engine: str, precision: str, folder: Path) -> Side:
    job = {
        "root": str(version.root),
        "category": CATEGORY,
        "weights": version.weights,
        "engine": engine,
        "precision": precision,
        "images": str(folder / "images.npy"),
        "out": str(folder),
    }
    return Side([sys.executable, "-W", "ignore", "-m", "bench.engine_ours", json.dumps(job)])


def show(compared: Sequence[Compared]) -> None:
    """Print a table for each backbone, and the last line."""
    for one in compared:
        header = _cells(f"batch {batch}" for batch in BATCHES)
        print(f"\n{f'{one.backbone}, img/s':40}{header}{'map max|diff|':>15}{'rank':>9}")
        for row in one.contenders:
            name = f"{row.kind}, {row.name}{' (auto)' if row.serves else ''}"
            speed = _cells(f"{speed:.1f}" for speed in row.images_per_s.values())
            difference = f"{'':15}" if row.map_difference is None else f"{row.map_difference:15.1e}"
            print(f"{name:40}{speed}{difference}" + ("" if row.rank is None else f"{row.rank:9.4f}"))
        for kind in ("trained", "imported"):
            if (ratio := one.ratio(kind)) is not None:
                print(
                    f"{f'{kind}, auto over the best of anomalib':40}"
                    + _cells(f"{value:.2f}" for value in ratio.values())
                )
    print(json.dumps({"bench": "engine", **{kind: _summary(compared, kind) for kind in ("trained", "imported")}}))


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"{text:>10}" for text in texts)


def _summary(compared: Sequence[Compared], kind: str) -> dict[str, Any]:
    """Reduce one kind of version to what a program reads, by backbone."""
    found = {}
    for one in compared:
        served, ratio = one.served(kind), one.ratio(kind)
        if served is not None and ratio is not None:
            speeds = {"ours": served.images_per_s, "anomalib": one.best_of_anomalib, "ratio": ratio}
            rounded = {
                name: {str(batch): round(value, 3) for batch, value in by_batch.items()}
                for name, by_batch in speeds.items()
            }
            found[one.backbone] = {"engine": served.name, **rounded}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of the environment that has anomalib.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument(
        "--arithmetic", choices=get_args(BackboneArithmetic), default="float32", help="Of our backbone."
    )
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    compared = []
    with tempfile.TemporaryDirectory(prefix="flawstream-engine-") as name:
        cells = write_cells(Path(name), max(BATCHES))
        for preset in arguments.presets:
            folder = Path(name) / preset
            folder.mkdir()
            compared.append(
                compare(preset, cells, folder, arguments.peer_python, arguments.rounds, arithmetic=arguments.arithmetic)
            )
    show(compared)


if __name__ == "__main__":
    main()
