"""Steps on a GPU train as those on a CPU do. Without a GPU the same steps run, but no graph."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import heads as tiny

from flawstream.fastflow.head import FastFlowHead
from schemas.settings import TrainingSettings
from training.steps import fit
from training.steps.features import FeatureStore
from training.steps.fit import FitProgress, fit_head
from training.steps.graphed import DeviceAdamW, FlatParameters, one_cycle

RECIPE = TrainingSettings(epochs=3, batch_size=4)


def store(folder: Path, count: int) -> FeatureStore:
    generator = torch.Generator().manual_seed(0)
    features = FeatureStore(folder, count, tiny.SPEC.feature_shapes)
    features.put(slice(None), [torch.randn((count, *shape), generator=generator) for shape in tiny.SPEC.feature_shapes])
    return features


@pytest.mark.parametrize("many_images", [5, 1000], ids=["statistics of all", "statistics across folds"])
def test_steps_for_a_gpu_train_the_head_that_steps_for_a_cpu_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many_images: int
) -> None:
    monkeypatch.setattr(fit, "_MANY_IMAGES", many_images)
    features, rows = store(tmp_path, 13), np.array([0, 1, 2, 4, 5, 7, 8, 9, 10, 12])  # the last batch is smaller
    on_cpu, for_gpu = FastFlowHead(tiny.SPEC, tiny.FLOW, seed=1), FastFlowHead(tiny.SPEC, tiny.FLOW, seed=1)
    expected = list(fit_head(on_cpu, features, rows, RECIPE, torch.device("cpu")))
    monkeypatch.setattr(fit, "_epochs_on_cpu", fit._epochs_on_gpu)  # noqa: SLF001
    found = list(fit_head(for_gpu, features, rows, RECIPE, torch.device("cpu")))
    assert [step.epoch for step in found] == [1, 2, 3]
    last_of_epochs: list[FitProgress] = expected[2::3]
    for step, reference in zip(found, last_of_epochs, strict=True):
        assert step.images == reference.images
        assert step.loss == pytest.approx(reference.loss, rel=1e-4)
    for name, parameter in on_cpu.state_dict().items():
        torch.testing.assert_close(for_gpu.state_dict()[name], parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_adamw_is_torch_s_with_changing_rates_and_momenta() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 3, 3), (5,), (1, 3, 1, 1))
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    flat = FlatParameters(ours)
    optimiser = DeviceAdamW(flat.values, flat.gradients, weight_decay=0.01)
    reference = torch.optim.AdamW(theirs, 1.0, weight_decay=0.01)
    for number in range(12):
        rate, momentum = 0.001 * (1 + number), 0.95 - 0.01 * number
        optimiser.rate.fill_(rate)
        optimiser.momentum.fill_(momentum)
        reference.param_groups[0] |= {"lr": rate, "betas": (momentum, 0.999)}
        for one, other in zip(ours, theirs, strict=True):
            assert one.grad is not None
            other.grad = torch.randn(one.shape, generator=generator)
            one.grad.copy_(other.grad)
        optimiser.step()
        reference.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_rates_and_momenta_are_those_of_torch_s_schedule() -> None:
    optimiser = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.01, total_steps=9, pct_start=0.3)
    rates, momenta = one_cycle(0.01, 9, 0.3)
    assert len(rates) == len(momenta) == 9
    for number, (rate, momentum) in enumerate(zip(rates, momenta, strict=True)):
        assert rate == optimiser.param_groups[0]["lr"]
        assert momentum == optimiser.param_groups[0]["betas"][0]
        optimiser.step()
        if number < 8:
            schedule.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_graphs_on_a_gpu_train_the_same_head(tmp_path: Path) -> None:
    features, rows = store(tmp_path, 24), np.arange(24)
    on_cpu, on_gpu = FastFlowHead(tiny.SPEC, tiny.FLOW, seed=1), FastFlowHead(tiny.SPEC, tiny.FLOW, seed=1)
    list(fit_head(on_cpu, features, rows, RECIPE, torch.device("cpu")))
    list(fit_head(on_gpu, features, rows, RECIPE, torch.device("cuda")))
    for name, parameter in on_cpu.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name], parameter, rtol=1e-3, atol=1e-4, msg=name)
