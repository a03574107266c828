"""Leaks: a trainer trains many categories in one process, and a detector loads and swaps many versions in another.

    PYTHONPATH=tests python -m soak.leaks                             200 categories, 1,000 loads: some 20 minutes
    PYTHONPATH=tests python -m soak.leaks --categories 16 --loads 0   the trainer alone, in a minute
    PYTHONPATH=tests python -m soak.leaks --engines openvino          one engine of a detector

Memory is what the process owns itself (RssAnon), after garbage collection. The first fifth warms up; growth is the
lowest memory of the last fifth over that of the second, as allocators make it waver. The trainer runs
`training.pipeline.run_job` on categories of 40 small images with the default flows, one epoch each, and the int8 trial
where the CPU has instructions for it. The detector's store holds three of six categories, so every round unloads some
versions and swaps others in; each is then judged by. Claims: under 0.5 MB a category and 0.1 MB a load, which is 100 MB
over 200 categories and 1,000 loads; a few MB are allowed for the allocator in short runs.

The last line is JSON; the exit code is 1 where a claim fails.
"""

import argparse
import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from helpers.tiny_models import write_version
from rich.console import Console

from flawstream.engines.choose import make_local_engine
from flawstream.engines.protocol import HeadRows
from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.manifest import FlowSpec
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings, TrainingSettings
from serving.engines import Engines
from serving.model_store import ModelStore
from training.datasets.samples import CategoryData
from training.pipeline import TrainingJob, run_job
from training.steps.features import FeatureExtractor

MOST_MB_A_CATEGORY, MOST_MB_A_LOAD = 0.5, 0.1
ALLOCATOR_MB = 10.0
"""What memory wavers by without a leak, measured over loads of a version again and again."""
ENGINES = ("ncnn", "openvino", "torch")
SIDE_PX = 64
IMAGES = 40
CATEGORIES = 6
RESIDENT = 3
_SHARE = 5

err = Console(stderr=True)


def train(count: int) -> Iterator[None]:
    """Train categories one after another, as a trainer of a fleet does."""
    model = ModelSettings(input_size=SIDE_PX)
    backbone = Backbone(model)
    extractor = FeatureExtractor(backbone, LimitSettings(), threads=1)
    engine = make_local_engine(DetectorSettings(), lambda: backbone, threads=1)
    recipe = TrainingSettings(epochs=1, calibration_fraction=0.5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = tuple(_write_image(folder / f"{number:02}.png", number) for number in range(IMAGES))
        for number in range(count):
            data = CategoryData(f"category-{number:03}", images, ())
            for _ in run_job(TrainingJob(data, model, recipe, str(folder / "registry")), extractor, engine):
                pass
            yield


def serve(engine_name: str, count: int) -> Iterator[None]:
    """Load versions and swap them, more than fit in memory, and judge an image by each."""
    model = ModelSettings(input_size=SIDE_PX)
    backbone = Backbone(model)
    spec, flow = backbone.spec, FlowSpec.of(model)
    engine = make_local_engine(DetectorSettings.model_validate({"engine": engine_name}), lambda: backbone, threads=1)
    pixels, rows = np.zeros((1, SIDE_PX, SIDE_PX, 3), np.uint8), np.arange(1)
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(folder)
        names = [f"category-{number}" for number in range(CATEGORIES)]
        for name in names:
            write_version(registry, name, "v2", spec=spec, flow=flow)
            write_version(registry, name, "v1", spec=spec, flow=flow)
        store = ModelStore(registry, Engines(engine), max_resident_bytes=0)
        store = ModelStore(registry, Engines(engine), RESIDENT * store.load(names[0]).size_bytes)
        done = 0
        while done < count:
            name = names[done % CATEGORIES]
            swaps = done % CATEGORIES < RESIDENT and store.get(name) is not None
            current = registry.current(name)
            registry.promote(name, "v2" if current == "v1" else "v1")
            if swaps:
                store.refresh()
            loaded = store.load(name)
            engine.detect(pixels, [HeadRows(loaded.loaded, rows, 0.03)])
            done += 1
            yield


def growth_mb(steps: Iterator[None], count: int, name: str) -> tuple[float, float]:
    """Run all steps; return the growth of memory, and the share of it that is of one step, in MB."""
    memory: list[float] = []
    began_s = reported_s = time.monotonic()
    for _ in steps:
        gc.collect()
        memory.append(_own_memory_mb())
        if time.monotonic() - reported_s > 10:
            reported_s = time.monotonic()
            err.print(
                f"{name}: {len(memory)} of {count}, {memory[-1]:.0f} MB, {reported_s - began_s:.0f} s", style="dim"
            )
    share = max(1, count // _SHARE)
    grown = min(memory[-share:]) - min(memory[share : 2 * share])
    err.print(f"{name}: {memory[share]:.0f} MB after warm-up, {memory[-1]:.0f} MB at the end, growth {grown:.1f} MB")
    return grown, grown / (count - 2 * share)


def measure(name: str, count: int) -> tuple[float, float]:
    """Measure one of them in a process of its own."""
    steps: Callable[[], Iterator[None]] = (lambda: train(count)) if name == "trainer" else (lambda: serve(name, count))
    return growth_mb(steps(), count, name)


def _own_memory_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1000


def _write_image(path: Path, number: int) -> Path:
    noise = np.random.default_rng(number).normal(128, 20, (SIDE_PX, SIDE_PX, 3))
    cv2.imwrite(str(path), np.clip(noise, 0, 255).astype(np.uint8))
    return path


def main() -> None:
    """Measure, print and exit with 1 where a claim fails."""
    options = _parse()
    runs = {"trainer": (options.categories, MOST_MB_A_CATEGORY)} if options.categories else {}
    if options.loads:
        runs |= dict.fromkeys(options.engines, (options.loads, MOST_MB_A_LOAD))
    report: dict[str, object] = {"soak": "leaks", "categories": options.categories, "loads": options.loads}
    failed = False
    for name, (count, most) in runs.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            grown, each = pool.apply(measure, (name, count))
        report[name] = {"growth_mb": round(grown, 1), "mb_each": round(each, 3)}
        failed |= grown > most * count + (ALLOCATOR_MB if most * count < 100 else 0)
    report["ok"] = not failed
    print(json.dumps(report))
    raise SystemExit(failed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="soak.leaks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--categories", type=int, default=200, help="that the trainer trains (default 200; 0: none)")
    parser.add_argument("--loads", type=int, default=1000, help="of each engine's detector (default 1,000; 0: none)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="of detectors (default all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
