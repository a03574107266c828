"""Training of one category beside anomalib's `Engine.fit`, and the cost of many categories in one trainer.

    make bench-training                                       3 rounds of 128 images; half an hour on two cores
    make bench-training ARGS='--images 64 --rounds 1'         in minutes
    make bench-training ARGS='--rounds 0'                     the cost of 20 categories alone
    make bench-training ARGS='--categories 0'                 the comparison alone

Same images (256 px PNG files), ResNet18 with random weights, 8 flow steps, 3x3 subnets only, batches of 32, all
threads. An epoch of anomalib's decodes every image, runs the backbone and trains the flow. An epoch of ours reads
features that were computed once and trains the flow; the features and the statistics that whiten them are counted too,
spread over the epochs of the default recipe. The first epoch of either is not counted. Rounds take turns, each in a
process of its own; anomalib's number of worker processes is the faster of those tried in a first round. The ratio is
the median of the rounds'. The growth is that of a line through the CPU seconds of equal small categories trained one
after another by one process. Needs nothing from the network. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from schemas.settings import TrainingSettings

_ROOT = Path(__file__).parents[1]
_PEER = _ROOT / "bench/peers/anomalib_training.py"
_BATCH = 32
_SIDE_PX = 256
_WORKERS = (0, 2)
_FEWEST_EPOCHS = 2
"""The first is not counted."""

err = Console(stderr=True)


def main() -> None:
    """Measure, then print the table and the JSON line."""
    options = _parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "good", options.images)
        threads = os.cpu_count() or 1
        job = {"epochs": options.epochs, "batch": _BATCH, "threads": threads}
        ours_job = job | {"kind": "epochs", "images": images}
        rounds, workers = [], None
        for number in range(options.rounds):
            tried = _WORKERS if workers is None else (workers,)
            theirs = {
                count: _run([options.peer_python, "-W", "ignore", str(_PEER)], job | {"folder": name, "workers": count})
                for count in tried
            }
            workers = min(theirs, key=lambda count: fmean(theirs[count]["epochs_s"]))
            assert theirs[workers]["images"] == options.images  # noqa: S101 - anomalib took all of them
            ours = _run([sys.executable, "-m", "bench.training_ours"], ours_job)
            rounds.append(compare(ours, theirs[workers], options.images))
            err.print(f"round {number + 1} of {options.rounds}: {rounds[-1]['ratio']:.1f} times", highlight=False)
        report: dict[str, Any] = {"bench": "training", "ratio": None, "cost_growth_1_to_20": None}
        if rounds:
            print_table(rounds, workers)
            ratios = [found["ratio"] for found in rounds]
            report |= {
                "ratio": round(median(ratios), 2),
                "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
                "ratio_without_features": round(median(found["ratio_without_features"] for found in rounds), 2),
                "ours_ms_an_image": round(median(found["ours_ms"] for found in rounds), 2),
                "anomalib_ms_an_image": round(median(found["theirs_ms"] for found in rounds), 2),
                "workers": workers,
            }
        if options.categories:
            categories_job = {
                "kind": "categories",
                "images": images,
                "count": options.categories,
                "threads": 1,
            }
            cpu_s = _run([sys.executable, "-m", "bench.training_ours"], categories_job)["cpu_s"]
            report |= {"cost_growth_1_to_20": round(growth(cpu_s), 3), "cpu_s": [round(cost, 2) for cost in cpu_s]}
    print(json.dumps(report))


def compare(ours: dict[str, Any], theirs: dict[str, Any], images: int) -> dict[str, float]:
    """Reduce a round to milliseconds for an image and epoch, and the ratios."""
    once_s = (ours["features_s"] + ours["statistics_s"]) / TrainingSettings().epochs
    ours_s, theirs_s = fmean(ours["epochs_s"]), fmean(theirs["epochs_s"])
    return {
        "ours_ms": (ours_s + once_s) / images * 1000,
        "epoch_ms": ours_s / images * 1000,
        "features_ms": ours["features_s"] / images * 1000,
        "statistics_ms": ours["statistics_s"] / images * 1000,
        "theirs_ms": theirs_s / images * 1000,
        "ratio": theirs_s / (ours_s + once_s),
        "ratio_without_features": theirs_s / ours_s,
    }


def growth(cpu_s: list[float]) -> float:
    """Fit a line to the costs of categories; return how much more than the first the last costs, as a share."""
    if len(cpu_s) < 2:  # noqa: PLR2004 - a line needs two
        return 0.0
    slope, start = np.polyfit(range(len(cpu_s)), cpu_s, 1)
    return float(slope * (len(cpu_s) - 1) / start)


def print_table(rounds: list[dict[str, float]], workers: int | None) -> None:
    """Show every round."""
    table = Table(
        "round",
        "anomalib, ms",
        "ours, ms",
        "of it the epoch",
        "features, once",
        "statistics, once",
        "ratio",
        "without features",
        title=f"an image and epoch; anomalib with {workers} workers",
    )
    for number, found in enumerate(rounds, start=1):
        names = ("theirs_ms", "ours_ms", "epoch_ms", "features_ms", "statistics_ms", "ratio", "ratio_without_features")
        table.add_row(str(number), *(f"{found[name]:.1f}" for name in names))
    Console(width=140).print(table)


def write_images(folder: Path, count: int) -> list[str]:
    """Write textures of different roughness."""
    folder.mkdir()
    paths = []
    for number in range(count):
        noise = np.random.default_rng(number).normal(128, 5 + number % 30, (_SIDE_PX // 4, _SIDE_PX // 4, 3))
        pixels = cv2.resize(np.clip(noise, 0, 255).astype(np.uint8), (_SIDE_PX, _SIDE_PX))
        paths.append(str(folder / f"{number:04}.png"))
        cv2.imwrite(paths[-1], pixels)
    return paths


def _run(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a process of its own; its standard error is shown."""
    with tempfile.TemporaryDirectory() as scratch:
        job_file, result_file = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job_file.write_text(json.dumps(job))
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
        subprocess.run([*command, str(job_file), str(result_file)], check=True, cwd=_ROOT, env=environment)  # noqa: S603
        found: dict[str, Any] = json.loads(result_file.read_text())
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=128, help="training images (default 128)")
    parser.add_argument("--epochs", type=int, default=3, help="of both, the first not counted (default 3, at least 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of ours and theirs (default 3; 0: no comparison)")
    parser.add_argument("--categories", type=int, default=20, help="one after another (default 20; 0: none)")
    parser.add_argument("--peer-python", default=".venv-anomalib/bin/python", help="anomalib's; `make peers` makes it")
    options = parser.parse_args()
    if options.epochs < _FEWEST_EPOCHS or options.images < _BATCH:
        parser.error(f"at least {_FEWEST_EPOCHS} epochs and {_BATCH} images")
    return options


if __name__ == "__main__":
    main()
