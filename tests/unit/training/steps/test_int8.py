"""Int8 graphs of flows: what training finds of them, what is kept, and what they give once written and read.

They run on any CPU that OpenVINO runs on; without instructions for int8 they are slow, and not used (`int8_pays`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.generators import returned
from helpers.tiny_models import make_manifest

from flawstream.calibration import calibrate
from flawstream.engines.openvino.compile import openvino_is_installed
from flawstream.engines.openvino.engine import OpenvinoEngine
from flawstream.engines.openvino.int8_graph import (
    CONSTANTS_FILE,
    GRAPH_FILE,
    Faster,
    Int8Flows,
    Int8Graph,
)
from flawstream.engines.protocol import arithmetic_of
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from schemas.manifest import ArithmeticTrial, EvaluationMetrics, FlowSpec, ModelManifest, Normalisation
from schemas.settings import LimitSettings, ModelSettings
from training.datasets.samples import Sample
from training.pipeline import EvaluatedVersion, EvaluationData, evaluate_version
from training.steps import quantise, trials
from training.steps.evaluate import ImageScorer
from training.steps.features import FeatureExtractor
from training.steps.quantise import write_flows
from training.steps.trials import Judged, choose_candidate, make_candidates

pytestmark = pytest.mark.skipif(not openvino_is_installed(), reason="OpenVINO is not installed")

SIDE = 64
FLOW = FlowSpec(steps=2, hidden_ratio=0.5, conv3x3_only=False, clamp=2.0, normalisation="none")
COUNT = 60


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor(Backbone(ModelSettings(strides=(8, 16), input_size=SIDE)), LimitSettings())


def make_head(extractor: FeatureExtractor, flow: FlowSpec = FLOW) -> FastFlowHead:
    head = FastFlowHead(extractor.spec, flow, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return head.eval()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write textures of different roughness."""
    folder = tmp_path_factory.mktemp("images")
    found = [folder / f"{number:02}.png" for number in range(COUNT)]
    for number, path in enumerate(found):
        noise = np.random.default_rng(number).normal(0, 4 + number, (SIDE, SIDE, 3))
        cv2.imwrite(str(path), np.clip(128 + noise, 0, 255).astype(np.uint8))
    return found


@pytest.fixture
def on_a_cpu_for_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "int8_pays", lambda: True)


def judge(
    extractor: FeatureExtractor, head: FastFlowHead, paths: list[Path], test: tuple[Sample, ...] = ()
) -> EvaluatedVersion:
    """Take every second image for ranges and hold the others out."""
    engine = OpenvinoEngine(extractor.backbone, int8=True)
    data = EvaluationData(paths[1::2], test, int8_images=paths[::2], top_fraction=0.03, false_alarm_rate=0.05)
    return returned(evaluate_version("bottle", extractor, engine, head, data))


def run_int8(
    extractor: FeatureExtractor, head: FastFlowHead, files: Mapping[str, bytes], images: list[Path]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Judge by the graph of the flows, and by plain torch."""
    [(_, features)] = list(extractor.batches(images))
    found = Int8Flows(head, files)([scale.numpy() for scale in features])
    with torch.inference_mode():
        return found, [grid.numpy() for grid in FoldedHead(head)(features)]


@pytest.mark.usefixtures("on_a_cpu_for_int8")
def test_flows_that_judge_as_float32_does_are_kept_with_the_proof_and_thresholds_of_their_own(
    extractor: FeatureExtractor, paths: list[Path]
) -> None:
    head = make_head(extractor)
    test = tuple(
        Sample(path, anomalous=number >= COUNT // 2, defect="rough", mask=None) for number, path in enumerate(paths)
    )
    found = judge(extractor, head, paths, test)
    trial = found.trials[-1]
    assert trial.kept
    assert trial.rank_correlation >= trials.LEAST_RANK
    assert trial.normal_images == COUNT // 2
    assert trial.image_auroc is not None
    assert trial.lost_defects == 0
    assert set(found.trial_files) == {GRAPH_FILE, CONSTANTS_FILE}
    assert trial.calibration is not None
    assert (trial.calibration.arithmetic, found.calibration.arithmetic) == ("int8", "float32")
    assert trial.metrics is not None
    assert trial.metrics.recall is not None

    manifest = make_manifest(spec=extractor.spec, flow=FLOW).model_copy(
        update={"calibration": found.calibration, "trials": found.trials}
    )
    engine = OpenvinoEngine(extractor.backbone, int8=True)
    assert manifest.calibration_in(arithmetic_of(engine, manifest)) == trial.calibration
    loaded = engine.load(head, manifest, dict(found.trial_files).__getitem__)
    scorer = ImageScorer(engine, [loaded], LimitSettings(), 0.03)
    served = sorted(image.score for (image,) in scorer.score(paths[1::2]))
    assert served == pytest.approx(trial.calibration.scores, rel=0.02)  # a batch of one may take another graph
    in_float32 = OpenvinoEngine(extractor.backbone)
    assert manifest.calibration_in(arithmetic_of(in_float32, manifest)) == found.calibration


@pytest.mark.usefixtures("on_a_cpu_for_int8")
@pytest.mark.parametrize("normalisation", ["statistics", "layer_norm", "none"])
def test_backbone_stays_in_float32(
    extractor: FeatureExtractor, paths: list[Path], normalisation: Normalisation
) -> None:
    head = make_head(extractor, FLOW.model_copy(update={"normalisation": normalisation}))
    [candidate] = make_candidates(extractor, OpenvinoEngine(extractor.backbone), head, paths[::2], COUNT // 2)
    assert isinstance(candidate.loaded, Int8Flows)


@pytest.mark.usefixtures("on_a_cpu_for_int8")
def test_graphs_that_do_harm_are_told_and_not_kept(
    extractor: FeatureExtractor, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(extractor)
    monkeypatch.setattr(quantise, "quantise", _coarsely)
    found = judge(extractor, head, paths)
    assert [(trial.scope, trial.kept) for trial in found.trials] == [("flows", False)]
    assert not found.trial_files


def _coarsely(module: torch.nn.Module, run: object) -> int:
    """Ruin every convolution, as ranges far from the truth would."""
    del run
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in module.modules():
            if isinstance(one, torch.nn.Conv2d):
                one.weight += torch.randn(one.weight.shape, generator=generator)
    return 0


@pytest.mark.usefixtures("on_a_cpu_for_int8")
def test_too_few_images_prove_nothing(extractor: FeatureExtractor, paths: list[Path]) -> None:
    assert make_candidates(extractor, OpenvinoEngine(extractor.backbone), make_head(extractor), paths[:30], 19) == []


def test_nothing_is_tried_where_int8_does_not_pay(
    extractor: FeatureExtractor, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "int8_pays", lambda: False)
    assert make_candidates(extractor, OpenvinoEngine(extractor.backbone), make_head(extractor), paths, COUNT) == []


NORMAL_SCORES = np.arange(1.0, 101.0)
"""Held out; at a rate of 0.05 the threshold is 96, and 4 lie above it."""


def judged(held_out: np.ndarray, defective: Sequence[float] = ()) -> Judged:
    calibration = calibrate(held_out, held_out, 0.05, 0.03)
    return Judged(held_out, np.array(defective), calibration, EvaluationMetrics())


def the_trial(int8_form: Judged, exact: Judged) -> ArithmeticTrial:
    """Compare one candidate; only its files matter."""
    candidate = trials.Candidate("int8", "flows", None, {"graph": b""})
    (trial,), files = choose_candidate([candidate], [int8_form], exact)
    assert bool(files) is trial.kept
    return trial


def test_scale_of_scores_is_no_harm_as_int8_has_thresholds_of_its_own() -> None:
    trial = the_trial(judged(NORMAL_SCORES * 2, [200.0, 300.0]), judged(NORMAL_SCORES, [100.0, 150.0]))
    assert trial.kept
    assert (trial.changed_verdicts, trial.lost_defects) == (0, 0)
    assert trial.alarms > 0.5  # by float32's threshold, which is why it is not used


def test_int8_that_loses_one_defect_at_its_threshold_is_not_kept() -> None:
    exact = judged(NORMAL_SCORES, [97.0, 150.0, 90.0])
    assert the_trial(judged(NORMAL_SCORES, [97.0, 150.0, 99.0]), exact).kept  # one more found is no harm
    trial = the_trial(judged(NORMAL_SCORES, [95.0, 150.0, 99.0]), exact)
    assert not trial.kept
    assert trial.lost_defects == 1


def test_int8_whose_verdicts_on_normal_images_differ_beyond_the_interval_is_not_kept() -> None:
    """Of 4 alarms in 100 images the 95 % interval reaches to 9.9: five more, and no six."""
    for swapped, kept in ((2, True), (4, False)):  # each swap changes two verdicts
        scores = NORMAL_SCORES.copy()
        scores[100 - swapped :], scores[90 : 90 + swapped] = (
            scores[90 : 90 + swapped].copy(),
            scores[100 - swapped :].copy(),
        )
        trial = the_trial(judged(scores), judged(NORMAL_SCORES))
        assert trial.rank_correlation >= trials.LEAST_RANK
        assert trial.changed_verdicts == 2 * swapped
        assert trial.kept is kept


def test_version_of_before_that_has_no_thresholds_of_int8_is_served_in_float32() -> None:
    trial = the_trial(judged(NORMAL_SCORES), judged(NORMAL_SCORES))
    old = make_manifest().model_copy(update={"trials": (trial.model_copy(update={"calibration": None}),)})
    assert trial.kept
    assert old.trial_in("int8") is None
    assert old.model_copy(update={"trials": (trial,)}).trial_in("int8") == trial


def test_older_version_with_a_backbone_in_int8_is_read_and_served_in_float32(extractor: FeatureExtractor) -> None:
    trial = the_trial(judged(NORMAL_SCORES), judged(NORMAL_SCORES)).model_copy(update={"scope": "version"})
    written = make_manifest(spec=extractor.spec, flow=FLOW).model_copy(update={"trials": (trial,)}).model_dump_json()
    old = ModelManifest.model_validate_json(written)
    engine = OpenvinoEngine(extractor.backbone, int8=True)
    assert arithmetic_of(engine, old) == "float32"
    assert old.calibration_in(arithmetic_of(engine, old)) == old.calibration
    assert old.serving_metrics == old.metrics
    loaded = engine.load(make_head(extractor), old)  # without the files of the graph
    assert not isinstance(loaded, Int8Flows)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_images_are_judged_each_for_itself_in_their_order(
    extractor: FeatureExtractor, paths: list[Path], count: int
) -> None:
    head = make_head(extractor)
    [(_, features)] = list(extractor.batches(paths[:8]))
    files = write_flows(head, features)
    found, exact = run_int8(extractor, head, files, paths[:count])
    for grid, other in zip(found, exact, strict=True):
        assert grid.shape == other.shape
        assert grid.dtype == np.float32
        np.testing.assert_allclose(grid, other, rtol=0.1, atol=0.02 * float(other.max()))


def test_damaged_graph_is_an_error_and_no_crash(extractor: FeatureExtractor) -> None:
    del extractor
    with pytest.raises(RuntimeError):
        Int8Graph({GRAPH_FILE: b"<net", CONSTANTS_FILE: b""})


def test_of_two_ways_the_one_that_is_faster_now_is_taken() -> None:
    now_s = 0.0
    taken: list[str] = []
    takes_s = {"one": 2.0, "other": 3.0}

    def way(name: str) -> Callable[[object], list[np.ndarray]]:
        def run(_: object) -> list[np.ndarray]:
            nonlocal now_s
            now_s += takes_s[name]
            taken.append(name)
            return []

        return run

    faster = Faster(way("one"), way("other"), clock=lambda: now_s)
    for _ in range(100):
        faster([])
    assert taken[:2] == ["one", "other"]
    assert 1 < taken.count("other") < 6
    takes_s["one"] = 9.0  # after a pause
    faster([])
    takes_s["one"] = 2.0
    taken.clear()
    for _ in range(20):
        faster([])
    assert taken.count("one") >= 19
    takes_s["one"] = 5.0
    taken.clear()
    for _ in range(100):
        faster([])
    assert taken.count("one") < 10
    takes_s["one"] = 1.0  # seen by the trials alone
    for _ in range(300):
        faster([])
    assert taken[-20:].count("one") > 15


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(extractor: FeatureExtractor, paths: list[Path], threads: int) -> None:
    """Two threads judge a batch of one scale by scale as well, more share its layers."""
    head = make_head(extractor)
    [(_, tensors)] = list(extractor.batches(paths[:3]))
    features = [scale.numpy() for scale in tensors]
    files = write_flows(head, tensors)
    flows, expected = Int8Flows(head, files, threads), Int8Flows(head, files, 1)(features)
    for _ in range(3):  # both ways
        for row in range(3):
            for grid, other in zip(flows([scale[row : row + 1] for scale in features]), expected, strict=True):
                np.testing.assert_allclose(grid[0], other[row], rtol=0.05, atol=0.01 * float(other.max()))
