"""Stacks are as large as the memory of the device allows."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import heads as tiny

from flawstream.fastflow.head import FastFlowHead
from schemas.manifest import FlowSpec
from schemas.settings import TrainingSettings
from training.steps.features import FeatureStore
from training.steps.fit import CategoryFit
from training.steps.stack_size import free_bytes, stack_sizes
from training.steps.stacked import activation_bytes

RECIPE = TrainingSettings(batch_size=4)
VALUES = sum(math.prod(shape) for shape in tiny.SPEC.feature_shapes)


def make_fit(folder: Path, images: int, seed: int = 0, flow: FlowSpec = tiny.FLOW, epochs: int = 20) -> CategoryFit:
    store = FeatureStore(folder, images, tiny.SPEC.feature_shapes)
    recipe = RECIPE.model_copy(update={"seed": seed, "epochs": epochs})
    return CategoryFit(FastFlowHead(tiny.SPEC, flow, seed=seed), store, np.arange(images), white=True, settings=recipe)


def test_stacks_fill_the_memory_in_order_and_one_that_is_too_large_is_alone(tmp_path: Path) -> None:
    counts = [1000, 1000, 1000, 9000, 1000, 1000]
    fits = [make_fit(tmp_path, count, seed) for seed, count in enumerate(counts)]
    features = 4 * 1000 * VALUES
    flows = fits[0].head.flows
    step = 2 * activation_bytes(flows, tiny.SPEC.feature_shapes, 2, RECIPE.batch_size)  # more than one takes
    assert stack_sizes(fits, math.inf) == [6]
    assert stack_sizes(fits, 0) == [1] * 6
    assert stack_sizes(fits, 2.5 * features + 2 * step) == [2, 1, 1, 2]
    assert stack_sizes(fits, 3.5 * features + 3 * step) == [3, 1, 2]
    assert stack_sizes(fits[:1], 0) == [1]
    assert stack_sizes([], 0) == []


def test_memory_of_activations_counts(tmp_path: Path) -> None:
    fits = [make_fit(tmp_path, 2, seed) for seed in range(4)]
    step = activation_bytes(fits[0].head.flows, tiny.SPEC.feature_shapes, 2, RECIPE.batch_size) / 2
    assert step > 20 * 2 * 4 * VALUES  # far more than the features
    assert stack_sizes(fits, 2 * step) == [1] * 4
    assert stack_sizes(fits, 1000 * step) == [4]


def test_only_one_configuration_and_recipe_share_a_stack(tmp_path: Path) -> None:
    other = tiny.FLOW.model_copy(update={"steps": 3})
    fits = [
        make_fit(tmp_path, 2, 0),
        make_fit(tmp_path, 3, 1),
        make_fit(tmp_path, 2, 0, epochs=3),
        make_fit(tmp_path, 2, 0, flow=other),
        make_fit(tmp_path, 2, 1, flow=other),
    ]
    assert stack_sizes(fits, math.inf) == [2, 1, 2]


def test_a_share_of_a_gpu_is_a_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50e9, 80e9))
    device = torch.device("cuda")
    assert free_bytes(device, 1.0) == pytest.approx(40e9)
    assert free_bytes(device, 0.25) == pytest.approx(16e9)
    assert free_bytes(torch.device("cpu"), 1.0) == math.inf
