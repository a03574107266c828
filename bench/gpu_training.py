"""Speed of training on a GPU: an epoch of one category, and of many that are trained together."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_engine import PRESETS, random_model
from flawstream.engines.device import open_device
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from schemas.manifest import BackboneSpec, FlowSpec
from schemas.settings import TrainingSettings
from training.steps.features import FeatureStore
from training.steps.fit import fit_heads, prepare_fit
from training.steps.stack_size import free_bytes, stack_sizes

IMAGES = 330
"""As ELPV mono has without those that are held out."""
EPOCHS = 8
NOT_COUNTED = 3
"""Epochs in which libraries choose their kernels and the graph is captured."""
TOGETHER = 16


def measure(folder: Path) -> dict[str, Any]:
    """Measure both presets; of the first also many categories."""
    found: dict[str, Any] = {}
    for preset in PRESETS:
        model = random_model(preset, folder)
        spec, flow = Backbone(model).spec, FlowSpec.of(model)
        store = random_features(folder, spec)
        found[spec.name] = one = measure_together(spec, flow, store, 1)
        print(f"  {spec.name}: {one['epoch_s'] * 1000:.0f} ms an epoch of {IMAGES} images", flush=True)
        if preset == PRESETS[0]:
            found["stacked"] = many = measure_together(spec, flow, store, TOGETHER)
            many["times"] = round(many["epoch_s"] / one["epoch_s"], 2)
            print(
                f"  {many['categories']} categories take {many['times']} times as long as one ({spec.name})", flush=True
            )
    return found


def random_features(folder: Path, spec: BackboneSpec) -> FeatureStore:
    """Make features of as many images as are trained on."""
    store = FeatureStore(folder, IMAGES, spec.feature_shapes)
    generator = torch.Generator().manual_seed(0)
    store.put(slice(None), [torch.randn((IMAGES, *shape), generator=generator) for shape in spec.feature_shapes])
    return store


def measure_together(spec: BackboneSpec, flow: FlowSpec, store: FeatureStore, categories: int) -> dict[str, Any]:
    """Train categories together, or as many as the GPU has memory for.

    Returns:
        How many there were, mean seconds of a counted epoch of all, and of the whole, without statistics.
    """
    one = prepare_fit(FastFlowHead(spec, flow), store, np.arange(IMAGES), TrainingSettings(epochs=EPOCHS))
    fits = [replace(one, head=copy.deepcopy(one.head)) for _ in range(categories)]
    fits = fits[: stack_sizes(fits, free_bytes(open_device(), share=1.0))[0]]
    started_s = ended_s = 0.0
    began_s = time.perf_counter()
    for _, step in fit_heads(fits):
        ended_s = time.perf_counter()
        if step.epoch == NOT_COUNTED:
            started_s = ended_s
    return {
        "categories": len(fits),
        "images": IMAGES,
        "epoch_s": round((ended_s - started_s) / (EPOCHS - NOT_COUNTED), 4),
        "whole_s": round(time.perf_counter() - began_s, 2),
    }
