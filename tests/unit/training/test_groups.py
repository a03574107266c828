"""Jobs of a group become what each becomes alone, whatever happens to the others."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.image_files import write_images
from numpy.typing import NDArray
from torch import nn

from flawstream.engines.cuda.errors import cuda_errors
from flawstream.engines.torch_engine import TorchEngine
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from schemas.errors import DeviceLostError
from schemas.settings import LimitSettings, ModelSettings, TrainingSettings
from training import groups, pipeline
from training.datasets.samples import CategoryData
from training.groups import run_group
from training.pipeline import Progress, Stage, TrainingJob
from training.steps import fit
from training.steps.features import FeatureExtractor, FeatureStore
from training.steps.fit import CategoryFit, FitProgress, prepare_fit
from training.steps.stack_size import stack_sizes
from training.steps.stacked import CategoryStep, StackedTraining

MODEL = ModelSettings(strides=(16, 32), input_size=64, flow_steps=2, hidden_ratio=0.2)
RECIPE = TrainingSettings(epochs=2, batch_size=4, false_alarm_rate=0.4, int8=False)
NAMES = ("bottle", "cable", "tile")


@pytest.fixture(scope="module")
def opened() -> tuple[FeatureExtractor, TorchEngine]:
    backbone = Backbone(MODEL)
    return FeatureExtractor(backbone, LimitSettings(), 1), TorchEngine(backbone)


@pytest.fixture
def jobs(tmp_path: Path) -> list[TrainingJob]:
    """Jobs of 8, 9 and 10 images, so that their epochs differ."""
    return [
        TrainingJob(
            CategoryData(name, tuple(write_images(tmp_path / name, 8 + number)), ()),
            MODEL,
            RECIPE.model_copy(update={"seed": number}),
            str(tmp_path / "models"),
        )
        for number, name in enumerate(NAMES)
    ]


Run = Callable[[Sequence[TrainingJob]], list[Progress]]


@pytest.fixture
def run(opened: tuple[FeatureExtractor, TorchEngine]) -> Run:
    return lambda jobs: list(run_group(jobs, *opened))


def ends(progress: list[Progress]) -> dict[str, Progress]:
    return {one.job: one for one in progress}


def weights(job: TrainingJob, last: Progress) -> dict[str, torch.Tensor]:
    assert last.manifest is not None, last.note
    return safetensors.torch.load(Registry(job.registry_root).read_file(last.manifest, WEIGHTS_FILE))


def stacked_epochs(one: CategoryFit) -> Iterator[FitProgress]:
    """Fit a category alone as on a GPU."""
    with cuda_errors():
        yield from (step for _, step in fit._stacked_epochs([one], torch.device("cpu")))  # noqa: SLF001


def assert_trained_as_alone(run: Run, jobs: Sequence[TrainingJob], found: dict[str, Progress]) -> None:
    for job in jobs:
        alone = replace(job, registry_root=f"{job.registry_root}-alone")
        expected = weights(alone, ends(run([alone]))[job.name])
        torch.testing.assert_close(weights(job, found[job.name]), expected, rtol=1e-4, atol=1e-5)
        manifest = found[job.name].manifest
        assert manifest is not None
        assert (manifest.category, manifest.training.seed) == (job.data.name, job.training.seed)


def test_damaged_category_fails_alone_and_the_others_are_trained_as_alone(run: Run, jobs: list[TrainingJob]) -> None:
    jobs[1].data.train[5].write_bytes(b"no image")
    progress = run(jobs)
    found = ends(progress)
    assert [found[name].stage for name in NAMES] == [Stage.DONE, Stage.FAILED, Stage.DONE]
    assert jobs[1].data.train[5].name in found["cable"].note
    assert found["cable"].traceback == ""
    epochs = [(one.job, one.epoch) for one in progress if one.stage is Stage.TRAINING]
    assert sorted(epochs) == [(name, epoch) for name in ("bottle", "tile") for epoch in (1, 2)]
    assert_trained_as_alone(run, [jobs[0], jobs[2]], found)


def test_each_category_of_a_group_has_its_own_depth(run: Run, jobs: list[TrainingJob]) -> None:
    for job, highest in zip(jobs, (1000, 4000, 250), strict=True):
        for path in job.data.train:
            pixels = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), np.float64)
            cv2.imwrite(str(path), (pixels * highest / pixels.max()).astype(np.uint16))
    found = ends(run(jobs))
    assert [found[name].manifest.bit_depth for name in NAMES] == [10, 12, 8]  # type: ignore[union-attr]
    for job in jobs:
        alone = ends(run([replace(job, registry_root=f"{job.registry_root}-alone")]))[job.name].manifest
        together = found[job.name].manifest
        assert alone is not None
        assert together is not None
        assert together.calibration.scores == pytest.approx(alone.calibration.scores, rel=1e-3)


def test_bug_in_one_category_s_statistics_is_its_own(
    run: Run, jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(head: FastFlowHead, features: FeatureStore, rows: NDArray[np.int64], recipe: TrainingSettings) -> Any:
        if recipe.seed == 1:
            raise ArithmeticError("it does not converge")
        return prepare_fit(head, features, rows, recipe)

    monkeypatch.setattr(pipeline, "prepare_fit", prepare)
    found = ends(run(jobs))
    assert [found[name].stage for name in NAMES] == [Stage.DONE, Stage.FAILED, Stage.DONE]
    assert found["cable"].note == "ArithmeticError: it does not converge"
    assert "in run_on_copy" in found["cable"].traceback


def test_divergence_is_of_one_category(run: Run, jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(head: FastFlowHead, features: FeatureStore, rows: NDArray[np.int64], recipe: TrainingSettings) -> Any:
        if recipe.seed == 1:
            with torch.no_grad():
                next(head.flows.parameters()).fill_(float("nan"))
        return prepare_fit(head, features, rows, recipe)

    monkeypatch.setattr(pipeline, "prepare_fit", prepare)
    found = ends(run(jobs))
    assert found["cable"].stage is Stage.FAILED
    assert not found["cable"].traceback
    monkeypatch.undo()
    assert_trained_as_alone(run, [jobs[0], jobs[2]], found)


def limit_stacks(monkeypatch: pytest.MonkeyPatch, most: int, error: str = "CUDA out of memory") -> list[int]:
    """Have larger stacks fail at their third step; return the sizes of all stacks that were tried."""
    tried: list[int] = []

    class Limited(StackedTraining):
        def __init__(self, flows: Sequence[nn.ModuleList], *args: Any, **settings: Any) -> None:
            super().__init__(flows, *args, **settings)
            self.size, self.steps = len(flows), 0
            tried.append(self.size)

        def run(self, steps: Sequence[CategoryStep | None]) -> None:
            self.steps += 1
            if self.size > most and self.steps == 3:
                raise RuntimeError(error)
            super().run(steps)

    monkeypatch.setattr(fit, "StackedTraining", Limited)
    return tried


def test_stack_that_is_out_of_memory_is_halved(
    run: Run, jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = limit_stacks(monkeypatch, most=2)
    progress = run(jobs)
    assert tried == [3, 2]  # the third is alone, and on a CPU that is no stack
    assert "3 categories cannot train together, now half as many: CUDA out of memory" in caplog.text
    found = ends(progress)
    epochs = [one.epoch for one in progress if one.stage is Stage.TRAINING and one.job == "cable"]
    assert epochs == [1, 2]  # the first is not reported again
    assert_trained_as_alone(run, jobs, found)


def test_category_that_is_out_of_memory_alone_fails_with_the_cure(
    run: Run, jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_stacks(monkeypatch, most=0)
    monkeypatch.setattr(fit, "_epochs", stacked_epochs)
    found = ends(run(jobs))
    assert {one.stage for one in found.values()} == {Stage.FAILED}
    assert "no memory to train on 8 images" in found["bottle"].note
    assert "training.batch_size" in found["bottle"].note


def test_lost_gpu_ends_the_trainer(run: Run, jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch) -> None:
    limit_stacks(monkeypatch, most=0, error="CUDA error: an illegal memory access was encountered")
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run(jobs)


def test_stacks_are_as_large_as_the_memory_allows(
    run: Run, jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limit_stacks(monkeypatch, most=3)
    monkeypatch.setattr(groups, "stack_sizes", lambda fits, memory: stack_sizes(fits, min(memory, 0.0)))
    assert {one.stage for one in ends(run(jobs)).values()} == {Stage.DONE}
    assert tried == []


def test_category_without_space_beside_the_others_is_run_after_them(
    run: Run, jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def allocate(*_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # the first category has two scales, and white ones of both
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    progress = run(jobs)
    assert [one.job for one in progress if one.stage is Stage.DONE] == ["bottle", "tile", "cable"]
    assert not any(one.stage is Stage.FAILED for one in progress)
