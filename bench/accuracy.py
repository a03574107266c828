"""How well ours separates defective images from normal ones, beside anomalib's FastFlow and PaDiM on the same images.

    make bench-accuracy                  three sets of a fixed pose, 3 seeds of ours, 1 of the peers; then, a seed each,
                                         two sets without a pose
    make bench-accuracy ARGS=--quick     one seed of one set, 3 epochs, in minutes

Same backbone weights (EfficientNet-Lite0), same 256 x 256 images, same number of epochs. Ours is
`training.pipeline.run_job` with the default recipe, nothing set per category: a fifth of the training images is held
out and calibrates, and the last epoch counts. The peers train on all of them, with anomalib's own model, loss,
optimiser and image score (the highest value of the map); the mean of the top 1 % of their map is shown beside it.
Finished runs are kept, keyed by all they depend on: an interrupted benchmark resumes. The last line is JSON.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from bench.accuracy_sets import ALIGNED, POSELESS, load_set
from schemas.settings import ModelSettings, TrainingSettings
from training.datasets.samples import CategoryData

OURS, FASTFLOW, PADIM = "ours", "anomalib_fastflow", "padim"
METHODS = (OURS, FASTFLOW, PADIM)
_EPOCHS, _QUICK_EPOCHS = 8, 3
_FALSE_ALARM_RATE = 0.05
_RECIPE_SOURCES = (
    *(f"flawstream/fastflow/{name}.py" for name in ("backbone", "flow", "head", "loss", "score", "statistics")),
    *("flawstream/imaging/decode.py", "training/steps/fit.py", "training/steps/features.py"),
)
_ROOT = Path(__file__).parents[1]
_PEER = _ROOT / "bench/peers/anomalib_accuracy.py"

err = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Attributes:
        set_name: Of `bench.accuracy_sets`.
        method: One of `METHODS`.
        seed: Of everything random.
        epochs: Passes over the training images; PaDiM needs none.
    """

    set_name: str
    method: str
    seed: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.set_name}, {self.method}, seed {self.seed}"


def main() -> None:
    """Do what is missing, then print the table and the JSON line."""
    options = _parse()
    folder = Path(options.folder)
    tiles = Path(options.mtd) if Path(options.mtd).is_dir() else None
    if tiles is None:
        err.print(f"no magnetic tiles at {options.mtd} (--mtd DIR): their sets are left out", style="yellow")
    names = options.sets or (ALIGNED[:1] if options.quick else ALIGNED + POSELESS)
    epochs = options.epochs or (_QUICK_EPOCHS if options.quick else _EPOCHS)
    sets = {name: found for name in names if (found := load_set(name, folder / "sets", tiles)) is not None}
    runs = [
        Run(name, method, seed, epochs if method != PADIM else 0)
        for name in sets
        for method in options.methods
        for seed in range(options.seeds if method == OURS and name in ALIGNED and not options.quick else 1)
    ]
    results = _do_all(runs, sets, folder, options)
    print_table(results)
    print(json.dumps(summary(results)))


def print_table(results: dict[Run, dict[str, Any]]) -> None:
    """Show every set and method: mean over seeds, and their spread."""
    table = Table(
        "set",
        "method",
        "seeds",
        "epochs",
        "AUROC",
        "± seeds",
        "top 1 %",
        "false alarms at 5 %",
        "99 % of binomial",
        "s",
    )
    for (name, method), of in _grouped(results).items():
        found = [results[run] for run in of]
        aurocs = [one["auroc"] for one in found]
        rates = [one["false_alarm_rate"] for one in found if "false_alarm_rate" in one]
        normal = found[0]["normal_images"]
        low, high = (binom.ppf(q, normal, _FALSE_ALARM_RATE) / normal for q in (0.005, 0.995))
        table.add_row(
            name,
            method,
            str(len(of)),
            str(of[0].epochs or "-"),
            f"{fmean(aurocs):.4f}",
            f"{pstdev(aurocs):.4f}" if len(of) > 1 else "-",
            f"{fmean(one['top_auroc'] for one in found):.4f}" if "top_auroc" in found[0] else "-",
            " ".join(f"{rate:.3f}" for rate in rates) or "-",
            f"{low:.3f} to {high:.3f}" if rates else "-",
            f"{fmean(one['seconds'] for one in found):.0f}",
        )
    Console(width=160).print(table)


def summary(results: dict[Run, dict[str, Any]]) -> dict[str, Any]:
    """Reduce to what a program reads: mean image AUROC by set and method; sets without a pose apart."""
    means: dict[str, dict[str, float]] = {}
    for (name, method), of in _grouped(results).items():
        means.setdefault(name, {})[method] = round(fmean(results[run]["auroc"] for run in of), 4)
    parts = {"sets": ALIGNED, "poseless": POSELESS}
    return {"bench": "accuracy"} | {
        part: {name: means[name] for name in names if name in means} for part, names in parts.items()
    }


def _grouped(results: dict[Run, dict[str, Any]]) -> dict[tuple[str, str], list[Run]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(results, key=lambda run: (*_order(run), run.seed)):
        groups.setdefault((run.set_name, run.method), []).append(run)
    return groups


def _order(run: Run) -> tuple[int, int]:
    return (ALIGNED + POSELESS).index(run.set_name), METHODS.index(run.method)


def _do_all(
    runs: Sequence[Run], sets: dict[str, CategoryData], folder: Path, options: argparse.Namespace
) -> dict[Run, dict[str, Any]]:
    """Take finished runs from the folder and do the others, one a core at a time, the longest first."""
    kept = folder / "runs"
    kept.mkdir(parents=True, exist_ok=True)
    results: dict[Run, dict[str, Any]] = {}
    failed: list[Run] = []
    missing: list[tuple[Run, Path]] = []
    for run in runs:
        file = kept / f"{run.set_name}-{run.method}-{run.seed}-{_key(run, sets[run.set_name])}.json"
        if file.exists():
            results[run] = json.loads(file.read_text())
        else:
            missing.append((run, file))
    err.print(f"{len(results)} of {len(runs)} runs are there already, in {kept}; {len(missing)} to do")
    missing.sort(key=lambda one: -one[0].epochs * (3 if one[0].method == FASTFLOW else 1))
    started = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting: dict[Future[dict[str, Any]], tuple[Run, Path]] = {
            pool.submit(_do, run, sets[run.set_name], options.peer_python): (run, file) for run, file in missing
        }
        try:
            for done, future in enumerate(as_completed(waiting), start=1):
                run, file = waiting[future]
                took = f"[{done}/{len(missing)}, {(time.monotonic() - started) / 60:.0f} min]"
                try:
                    results[run] = future.result()
                    _write(file, results[run])
                except Exception as error:  # noqa: BLE001 - the other runs are worth keeping
                    failed.append(run)
                    err.print(f"{took} {run} failed: {error}", style="red", markup=False, highlight=False)
                    continue
                err.print(f"{took} {run}: AUROC {results[run]['auroc']:.4f}", markup=False, highlight=False)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; the others are kept, and the same command does what is missing")
    return results


def _key(run: Run, data: CategoryData) -> str:
    """Digest all that a result depends on: images, settings and the code of the method."""
    digest = hashlib.sha256(data.sha256().encode())
    digest.update(repr(run).encode())
    if run.method == OURS:
        digest.update((ModelSettings().model_dump_json() + TrainingSettings().model_dump_json()).encode())
        sources = [_ROOT / source for source in _RECIPE_SOURCES]
    else:
        sources = [_PEER, _PEER.parent / "constraints.txt"]
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _do(run: Run, data: CategoryData, peer_python: str) -> dict[str, Any]:
    """Do one run in a process of its own, with one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        job, result = Path(scratch) / "job.json", Path(scratch) / "result.json"
        described = asdict(run) | {
            "train": [str(path.absolute()) for path in data.train],
            "test": [str(sample.path.absolute()) for sample in data.test],
            "anomalous": [sample.anomalous for sample in data.test],
            "threads": 1,
        }
        job.write_text(json.dumps(described))
        command = (
            [sys.executable, "-m", "bench.accuracy_ours"]
            if run.method == OURS
            else [peer_python, "-W", "ignore", str(_PEER)]
        )
        report = partial(err.print, style="dim", highlight=False)
        for line in _lines([*command, str(job), str(result)]):
            report(f"{run}: {line}")
        found: dict[str, Any] = json.loads(result.read_text())
    labels = np.array(described["anomalous"])
    of = {"auroc": float(roc_auc_score(labels, np.array(found.pop("scores"))))}
    if "top_scores" in found:
        of["top_auroc"] = float(roc_auc_score(labels, np.array(found.pop("top_scores"))))
    return of | found | {"normal_images": int((~labels).sum())}


def _lines(command: list[str]) -> Iterator[str]:
    """Run a command, reporting its standard error as it comes; its last lines are the error's text."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=_ROOT, env=environment) as process:  # noqa: S603
        assert process.stderr is not None  # noqa: S101 - it is a pipe
        last: list[str] = []
        for line in process.stderr:
            last = [*last[-9:], line.rstrip()]
            if line.startswith("epoch "):
                yield line.rstrip()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {process.returncode}:\n" + "\n".join(last))


def _write(file: Path, result: dict[str, Any]) -> None:
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(file)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed of one set, 3 epochs")
    parser.add_argument("--sets", nargs="+", choices=ALIGNED + POSELESS, help="only these sets")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these methods")
    parser.add_argument("--epochs", type=int, help=f"of ours and of anomalib's FastFlow (default {_EPOCHS})")
    parser.add_argument("--seeds", type=int, default=3, help="runs of ours (default 3)")
    parser.add_argument("--mtd", default=str(_ROOT.parent / "shared/data/mtd"), help="the magnetic tiles' folder")
    parser.add_argument("--folder", default=".flawstream/bench/accuracy", help="where finished runs and sets are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    parser.add_argument("--peer-python", default=".venv-anomalib/bin/python", help="anomalib's; `make peers` makes it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
