"""What `flawstream evaluate` reports of a version, beside what a worker on the stream says of the same images.

    make bench-verdicts                          ELPV mono cut to 16, 24 and 40 training images, then all of them
    make bench-verdicts ARGS="--tiles DIR"       magnetic tiles cut to 20 as well
    make bench-verdicts ARGS="--images 16 --presets efficientnet_lite2 resnet18"

Each version is trained with the default recipe by the command line. Then, for each engine, `flawstream evaluate --json
--images` judges the test images, and the same files go through Valkey and `flawstream worker`. Scores may differ by a
relative 1e-5, verdicts not at all. A preset whose weights no package has gets random ones: its verdicts can be
compared, its AUROC says nothing. The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from flawstream.calibration import expected_false_alarms
from flawstream.fastflow.weights import PACKAGED_BACKBONES
from flawstream.registry.registry import Registry
from flawstream_cli.round_trip import RoundTrip, stream_samples
from schemas.presets import PRESETS, PresetName
from schemas.settings import RedisSettings, Settings
from training.datasets.elpv import export_elpv
from training.datasets.magnetic_tile import load_magnetic_tile
from training.datasets.mvtec import load_mvtec
from training.datasets.samples import CategoryData, Sample
from workers.redis.embedded import EmbeddedServer

MOST_DIFFERENCE = 1e-5
"""Of scores, relative to the larger of the score and 1."""
ENGINES = ("ncnn", "openvino", "torch")
LEAST_AUROC = {"elpv-mono": 0.85, "mtd": 0.80}
"""With 16 to 40 training images. anomalib's PaDiM has .81 to .87 with 20 images on other sets."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One version on one engine.

    Attributes:
        name: The set and the number of training images.
        engine: As the setting names it.
        evaluated: What `flawstream evaluate --json` says.
        difference: Largest difference of a score between the two, relative.
        flips: Images whose verdicts differ.
        recall: Of the worker's verdicts.
        unanswered: Images without a result.
    """

    name: str
    engine: str
    evaluated: Mapping[str, Any]
    difference: float
    flips: int
    recall: float
    unanswered: int

    @property
    def is_equal(self) -> bool:
        """Say whether the worker judges as `evaluate` reports."""
        return self.difference <= MOST_DIFFERENCE and not self.flips and not self.unanswered


def write_cut(data: CategoryData, folder: Path, train_images: int | None, seed: int, test_images: int | None) -> None:
    """Write a category as MVTec AD's layout has it, with some of its training images, as links.

    Args:
        data: The whole.
        folder: The data set's, to be made.
        train_images: How many, drawn at random; None takes all.
        seed: Of the draw.
        test_images: How many of each class, spread over all; None takes all.
    """
    chosen = np.random.default_rng(seed).permutation(len(data.train))[:train_images]
    links = {f"train/good/{row:05}": data.train[row] for row in sorted(chosen.tolist())}
    for anomalous in (False, True):
        samples = [sample for sample in data.test if sample.anomalous is anomalous]
        step = 1 if test_images is None else max(1, len(samples) // test_images)
        links |= {f"test/{one.defect}/{row:05}": one.path for row, one in enumerate(samples) if row % step == 0}
    for name, path in links.items():
        link = folder / data.name / f"{name}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.absolute())


def compare(
    folder: Path, name: str, category: str, engines: Sequence[str], training: Mapping[str, str]
) -> list[Compared]:
    """Train a version on a data set, then judge its test images both ways on each engine.

    Args:
        folder: Holds `data`; models come beside it.
        name: What it is called.
        category: The only one of the data set.
        engines: By name.
        training: Settings of training, as the environment gives them.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLAWSTREAM_")}
    environment |= {"FLAWSTREAM_REGISTRY__ROOT": str(folder / "models"), **training}
    _run(environment, "train", folder / "data", "--no-check")
    (data,) = load_mvtec(folder / "data")
    found = []
    for engine in engines:
        with_engine = environment | {"FLAWSTREAM_DETECTOR__ENGINE": engine}
        evaluated = json.loads(_run(with_engine, "evaluate", folder / "data", "--json", "--images"))[category]
        trip = _stream(with_engine, data)
        found.append(_compare(name, engine, evaluated, trip, data.test))
    return found


def _run(environment: Mapping[str, str], *arguments: object) -> str:
    command = [sys.executable, "-m", "flawstream_cli", *map(str, arguments)]
    ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)  # noqa: S603 - our own interpreter
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} ended with {ran.returncode}:\n{ran.stderr}")
    return ran.stdout


def _stream(environment: Mapping[str, str], data: CategoryData) -> RoundTrip:
    with EmbeddedServer() as server, _worker(environment, server.url):
        settings = Settings(redis=RedisSettings(url=server.url))
        return asyncio.run(stream_samples(settings, [(data.name, sample) for sample in data.test]))


@contextlib.contextmanager
def _worker(environment: Mapping[str, str], url: str) -> Iterator[None]:
    """Have a worker running; its first line says that it is ready."""
    command = [sys.executable, "-m", "flawstream_cli", "worker", "--redis", url]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:  # noqa: S603 - our own interpreter
        try:
            assert process.stdout is not None  # noqa: S101 - asked for
            if not process.stdout.readline():
                raise RuntimeError("the worker did not start; run `flawstream worker` by hand to see why")
            yield
        finally:
            process.send_signal(signal.SIGTERM)


def _compare(
    name: str, engine: str, evaluated: Mapping[str, Any], trip: RoundTrip, samples: Sequence[Sample]
) -> Compared:
    reported = {image["path"]: image for image in evaluated["images"]}
    pairs = [(reported[str(trip.samples[key].path)], result) for key, result in trip.results.items()]
    differences = [abs(one["score"] - result.score) / max(1.0, abs(one["score"])) for one, result in pairs]
    flagged = [result.verdict == "anomalous" for one, result in pairs if one["anomalous"]]
    return Compared(
        name=name,
        engine=engine,
        evaluated=evaluated,
        difference=max(differences, default=float("nan")),
        flips=sum(one["verdict"] != result.verdict for one, result in pairs),
        recall=float(np.mean(flagged)),
        unanswered=len(samples) - len(pairs),
    )


def main() -> None:
    """Compare every set on every engine and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, help="folder of the magnetic tiles' data set")
    parser.add_argument("--seeds", type=int, default=1, help="draws of training images for each number of them")
    parser.add_argument("--images", type=int, nargs="*", default=[16, 24, 40], help="training images of ELPV mono")
    parser.add_argument("--tile-images", type=int, nargs="*", default=[20], help="training images of the tiles")
    parser.add_argument("--presets", nargs="*", default=["efficientnet_lite0"], choices=PRESETS)
    parser.add_argument("--test-images", type=int, help="at most about so many test images of each class")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as kept:
        sets: dict[str, tuple[CategoryData, list[int]]] = {
            "elpv-mono": (load_mvtec(export_elpv(Path(kept) / "elpv"), ["mono"])[0], asked.images)
        }
        if asked.tiles is not None:
            sets["mtd"] = load_magnetic_tile(asked.tiles)[0], asked.tile_images
        print(
            f"{'set':<33} {'seed':>4} {'engine':<9} {'AUROC':>6} {'recall':>6} {'worker':>6} {'false alarms':>12} "
            f"{'expected':>13} {'threshold':>9} {'difference':>10} {'flips':>5}"
        )
        for set_name, (data, counts) in sets.items():
            for preset, count, seed in product(asked.presets, counts, range(asked.seeds)):
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    write_cut(data, folder / "data", count, seed, asked.test_images)
                    model = {
                        "FLAWSTREAM_MODEL__PRESET": preset,
                        "FLAWSTREAM_MODEL__WEIGHTS": weights_of(preset, folder),
                    }
                    found = compare(folder, f"{set_name}-{count} {preset}", data.name, asked.engines, model)
                    manifest = _current(folder / "models", data.name)
                rows += [_row(one, set_name, seed, expected_false_alarms(manifest.calibration)) for one in found]
    failed = [row for row in rows if not row["equal"]]
    print(json.dumps({"bench": "verdicts", "equal": not failed, "rows": rows}))
    sys.exit(bool(failed))


def weights_of(preset: PresetName, folder: Path) -> str:
    """Name a preset's weights; write random ones into the folder where no package has any."""
    backbone = PRESETS[preset].fields["backbone"]
    if backbone in PACKAGED_BACKBONES:
        return "package"
    torch.manual_seed(0)
    path = folder / "random.safetensors"
    save_file(timm.create_model(backbone).state_dict(), path)
    return str(path)


def _current(root: Path, category: str) -> Any:
    registry = Registry(str(root))
    return registry.manifest(category, registry.current(category) or "")


def _row(one: Compared, set_name: str, seed: int, expected: tuple[float, float]) -> dict[str, Any]:
    said = one.evaluated
    low, high = expected
    cells = (
        f"{one.name:<33} {seed:>4} {one.engine:<9} {said['image_auroc']:>6.3f} {said['recall']:>6.3f}",
        f"{one.recall:>6.3f} {said['false_alarm_rate']:>12.3f} {low:>6.3f}-{high:<6.3f} {said['threshold']:>9.3g}",
        f"{one.difference:>10.1e} {one.flips:>5}",
    )
    print(*cells, flush=True)
    return {
        "set": one.name,
        "seed": seed,
        "engine": one.engine,
        "auroc": said["image_auroc"],
        "enough": said["image_auroc"] >= LEAST_AUROC[set_name],
        "recall": said["recall"],
        "worker_recall": one.recall,
        "false_alarm_rate": said["false_alarm_rate"],
        "expected_false_alarm_rate": expected,
        "threshold": said["threshold"],
        "difference": one.difference,
        "flips": one.flips,
        "equal": one.is_equal,
    }


if __name__ == "__main__":
    main()
