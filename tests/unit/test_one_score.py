"""One score: calibration, evaluation and serving say the same of an image, whatever its grids are."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from helpers.generators import returned
from helpers.tiny_models import FLOW, INFINITE, NOT_A_NUMBER, SPEC, TOO_LARGE, TinyEngine, image, write_version

from flawstream.engines.protocol import Engine
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.score import HIGHEST_SCORE
from flawstream.imaging.pixels import PixelForm
from flawstream.registry.registry import Registry
from schemas.messages import Verdict
from schemas.settings import DetectorSettings, LimitSettings
from serving.detector import DetectorService
from training.datasets.samples import Sample
from training.pipeline import EvaluationData, evaluate_version
from training.steps.evaluate import Evaluation, ImageScorer
from workers.ports import Detection

pytestmark = pytest.mark.anyio

LEVELS = (0, 10, 180, 190, 200, 250, NOT_A_NUMBER, INFINITE, TOO_LARGE)
"""Grey levels; the score is the level over 100, but of the last three NaN, infinite and a million."""
EXPECTED = (0.0, 0.1, 1.8, 1.9, 2.0, 2.5, HIGHEST_SCORE, HIGHEST_SCORE, 1e6)
EXPLODED = tuple((np.arange(19.0) + 1) * 1e8)
"""Calibration scores as a flow gives them that was trained on too few images."""


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{row}-{level:03}.png" for row, level in enumerate(LEVELS)]
    for path, level in zip(found, LEVELS, strict=True):
        cv2.imwrite(str(path), image(level))
    return found


async def serve(registry: Registry, engine: Engine) -> list[Detection]:
    service = DetectorService(registry, engine, DetectorSettings(refresh_s=3600))
    await service.start()
    try:
        outcomes = await service.detect(np.stack([image(level) for level in LEVELS]), ["bottle"] * len(LEVELS))
    finally:
        await service.stop()
    assert all(isinstance(outcome, Detection) for outcome in outcomes)
    return [outcome for outcome in outcomes if isinstance(outcome, Detection)]


async def test_evaluation_and_serving_score_extremes_alike(tmp_path: Path, paths: list[Path]) -> None:
    registry = Registry(str(tmp_path / "models"))
    manifest = write_version(registry, "bottle")
    served = await serve(registry, TinyEngine())
    scorer = ImageScorer(TinyEngine(), ["bottle@v1"], LimitSettings(), manifest.calibration.top_fraction)
    evaluated = [found for (found,) in scorer.score(paths)]
    assert [one.score for one in evaluated] == [one.score for one in served]
    assert [one.score for one in served] == pytest.approx(EXPECTED)
    evaluation = Evaluation()
    for found in evaluated:
        evaluation.add(Sample(found.path, anomalous=True, defect="dent", mask=None), found)
    recall = evaluation.metrics(manifest.calibration.threshold).recall
    assert recall == np.mean([one.verdict is Verdict.ANOMALOUS for one in served]) == 5 / 9


async def test_calibration_scores_are_those_that_are_served(tmp_path: Path, paths: list[Path]) -> None:
    """Each held-out image, pushed once more, has the very p-value that its own score stands for."""
    registry = Registry(str(tmp_path / "models"))
    data = EvaluationData(held_out=paths[:6], test=(), int8_images=(), top_fraction=0.0, false_alarm_rate=0.3)
    extractor = SimpleNamespace(limits=LimitSettings(), form=PixelForm.of(SPEC))  # only int8 needs the backbone
    found = returned(evaluate_version("bottle", extractor, TinyEngine(), FastFlowHead(SPEC, FLOW).eval(), data))  # type: ignore[arg-type]
    write_version(registry, "bottle")
    served = await serve(registry, TinyEngine())
    assert found.calibration.scores == tuple(sorted(one.score for one in served[:6]))


async def test_threshold_past_what_a_map_holds_is_reached(tmp_path: Path) -> None:
    """Maps end at 65,504; scores do not, or a version with such a threshold would never flag anything."""
    registry = Registry(str(tmp_path))
    write_version(registry, "bottle", scores=EXPLODED)
    served = await serve(registry, TinyEngine(factor=1e9))
    assert [one.verdict for one in served[:6]] == [Verdict.NORMAL] * 4 + [Verdict.ANOMALOUS] * 2
    assert max(float(grid.max()) for grid in served[5].grids) < 65_505
