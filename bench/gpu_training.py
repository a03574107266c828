"""Speed of training on a GPU: an epoch of one category, and many categories in one process, in threads and stacked."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_engine import PRESETS, random_model
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from schemas.manifest import BackboneSpec, FlowSpec
from schemas.settings import ModelSettings, TrainingSettings
from training.steps.features import FeatureStore
from training.steps.fit import fit_head, fit_heads

IMAGES = 330
"""As ELPV mono has without those that are held out."""
EPOCHS = 8
NOT_COUNTED = 3
"""Epochs in which libraries choose their kernels and graphs are captured."""
AT_ONCE = 16
TIMEOUT_S = 60.0


def measure(folder: Path) -> dict[str, Any]:
    """Measure both presets."""
    found: dict[str, Any] = {}
    for preset in PRESETS:
        model = random_model(preset, folder)
        spec = Backbone(model).spec
        store = _random_features(folder, spec)
        epoch_s, whole_s = _train(1, spec, model, store)
        found[spec.name] = {"images": IMAGES, "epoch_s": round(epoch_s, 4), "whole_s": round(whole_s, 2)}
        print(f"  {spec.name}: {epoch_s * 1000:.0f} ms an epoch of {IMAGES} images", flush=True)
        if preset == PRESETS[0]:
            at_once_s, _ = _train(AT_ONCE, spec, model, store)
            stacked_s, stacked_whole_s = _train_stacked(AT_ONCE, spec, model, store)
            times, stacked_times = at_once_s / epoch_s, stacked_s / epoch_s
            found["at_once"] = {"categories": AT_ONCE, "times": round(times, 2)}
            found["stacked"] = {
                "categories": AT_ONCE,
                "epoch_s": round(stacked_s, 4),
                "whole_s": round(stacked_whole_s, 2),
                "times": round(stacked_times, 2),
            }
            print(f"  {AT_ONCE} categories in threads take {times:.2f} times as long as one ({spec.name})", flush=True)
            print(f"  {AT_ONCE} categories stacked take {stacked_times:.2f} times as long as one", flush=True)
    return found


def _random_features(folder: Path, spec: BackboneSpec) -> FeatureStore:
    store = FeatureStore(folder, IMAGES, spec.feature_shapes)
    generator = torch.Generator().manual_seed(0)
    store.put(slice(None), [torch.randn((IMAGES, *shape), generator=generator) for shape in spec.feature_shapes])
    return store


def _train(categories: int, spec: BackboneSpec, model: ModelSettings, store: FeatureStore) -> tuple[float, float]:
    """Train categories in threads; return the mean seconds of a counted epoch, and of the whole."""
    recipe = TrainingSettings(epochs=EPOCHS)
    ready = threading.Barrier(categories, timeout=TIMEOUT_S)

    def train(seed: int) -> tuple[float, float]:
        head = FastFlowHead(spec, FlowSpec.of(model), seed=seed)
        started_s = 0.0
        for step in fit_head(head, store, np.arange(IMAGES), recipe):
            if step.epoch == NOT_COUNTED:
                ready.wait()
                started_s = time.perf_counter()
        return started_s, time.perf_counter()

    began_s = time.perf_counter()
    with ThreadPoolExecutor(categories) as threads:
        spans = list(threads.map(train, range(categories)))
    whole_s = time.perf_counter() - began_s
    return (max(end for _, end in spans) - min(start for start, _ in spans)) / (EPOCHS - NOT_COUNTED), whole_s


def _train_stacked(
    categories: int, spec: BackboneSpec, model: ModelSettings, store: FeatureStore
) -> tuple[float, float]:
    """Train categories stacked; return the mean seconds of a counted epoch of all, and of the whole."""
    heads = [FastFlowHead(spec, FlowSpec.of(model), seed=seed) for seed in range(categories)]
    rows = [np.arange(IMAGES)] * categories
    started_s = ended_s = 0.0
    began_s = time.perf_counter()
    for _, step in fit_heads(heads, [store] * categories, rows, TrainingSettings(epochs=EPOCHS)):
        ended_s = time.perf_counter()
        if step.epoch == NOT_COUNTED:
            started_s = ended_s
    return (ended_s - started_s) / (EPOCHS - NOT_COUNTED), time.perf_counter() - began_s
