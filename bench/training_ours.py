"""Our training for `bench.training`, in a process of its own: `python -m bench.training_ours JOB RESULT`."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_engine import random_model
from flawstream.engines.choose import make_local_engine
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from schemas.manifest import FlowSpec
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings, TrainingSettings
from training.datasets.samples import CategoryData
from training.pipeline import TrainingJob, run_job
from training.steps.features import FeatureCache, FeatureExtractor
from training.steps.fit import fit_head

_CATEGORY_IMAGES, _CATEGORY_SIDE_PX, _CATEGORY_EPOCHS = 40, 64, 4


def main(job_file: str, result_file: str) -> None:
    """Do a job of `bench.training`: of the kind `epochs`, or `categories`."""
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        found = {"epochs": measure_epochs, "categories": measure_categories}[job["kind"]](job, Path(folder))
    Path(result_file).write_text(json.dumps(found))


def measure_epochs(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure what is done once, and each epoch: features are computed, then read in every epoch.

    The features of one image come first, uncounted: they compile the backbone, once in a process.
    """
    model = random_model("resnet18", folder)
    paths = [Path(path) for path in job["images"]]
    recipe = TrainingSettings(epochs=job["epochs"], batch_size=job["batch"])
    extractor = FeatureExtractor(Backbone(model), LimitSettings(), job["threads"])
    for _ in extractor.batches(paths[:1]):
        pass
    began_s = time.perf_counter()
    features = FeatureCache(folder, paths, extractor)
    for _ in features.fill():
        pass
    features_s = time.perf_counter() - began_s
    head = FastFlowHead(extractor.spec, FlowSpec.of(model), seed=0)
    ends_s: dict[int, float] = {}
    first_step_s = 0.0
    began_s = time.perf_counter()
    for step in fit_head(head, features, np.arange(len(paths)), recipe):
        ends_s[step.epoch] = time.perf_counter()
        first_step_s = first_step_s or ends_s[step.epoch]
    epochs_s = [ends_s[epoch] - ends_s[epoch - 1] for epoch in range(2, job["epochs"] + 1)]
    steps = -(-len(paths) // job["batch"])
    first_step_share_s = epochs_s[0] / steps if epochs_s else 0.0
    statistics_s = max(0.0, first_step_s - began_s - first_step_share_s)
    return {"features_s": features_s, "statistics_s": statistics_s, "epochs_s": epochs_s}


def measure_categories(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train equal categories one after another, as one trainer of a fleet does; return the CPU seconds of each.

    A first one, uncounted, compiles the backbone.
    """
    model = ModelSettings(input_size=_CATEGORY_SIDE_PX)
    paths = tuple(Path(path) for path in job["images"][:_CATEGORY_IMAGES])
    backbone = Backbone(model)
    extractor = FeatureExtractor(backbone, LimitSettings(), job["threads"])
    engine = make_local_engine(DetectorSettings(), lambda: backbone, job["threads"])
    recipe = TrainingSettings(epochs=_CATEGORY_EPOCHS, calibration_fraction=0.5)
    cpu_s: list[float] = []
    for number in range(job["count"] + 1):
        began_s = time.process_time()
        data = CategoryData(f"category-{number:02}", paths, ())
        for _ in run_job(TrainingJob(data, model, recipe, str(folder / "registry")), extractor, engine):
            pass
        cpu_s.append(time.process_time() - began_s)
        print(f"category {number} of {job['count']}: {cpu_s[-1]:.2f} CPU seconds", file=sys.stderr, flush=True)
    return {"cpu_s": cpu_s[1:]}


if __name__ == "__main__":
    main(*sys.argv[1:])
