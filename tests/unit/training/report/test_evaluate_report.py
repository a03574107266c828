"""Metrics against scikit-learn, and the report as a file that can be sent."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import recall_score, roc_auc_score

from flawstream.imaging.maps import encode_map
from schemas.errors import DatasetError
from schemas.manifest import DefectMetrics, EvaluationMetrics
from schemas.messages import MapCodec
from training.datasets.samples import Sample
from training.report.metrics import rate_interval
from training.report.plots import BOTTOM, LEFT, RIGHT, TOP, plot_losses, plot_scores
from training.report.report import JudgedImage, TrainingCourse, overlay, training_report, write_report
from training.steps.evaluate import Evaluation, ScoredImage, spread, summarise

SIDE = 16


def scored(score: float, anomaly_map: NDArray[np.float32] | None = None) -> ScoredImage:
    values = np.zeros((SIDE, SIDE), np.float32) if anomaly_map is None else anomaly_map
    return ScoredImage(Path("a.png"), score, (values,), SIDE)


def sample(*, anomalous: bool, mask: Path | None = None) -> Sample:
    return Sample(Path("a.png"), anomalous, "scratch" if anomalous else "good", mask)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.booleans()), min_size=2, max_size=60).filter(
        lambda pairs: len({label for _, label in pairs}) == 2
    ),
    st.floats(0, 50),
)
def test_metrics_are_scikit_learn_s(pairs: list[tuple[float, bool]], threshold: float) -> None:
    scores, labels = np.array([score for score, _ in pairs]), np.array([label for _, label in pairs])
    kinds = ["scratch" if label else None for label in labels]
    evaluation = Evaluation()
    for score, label in pairs:
        evaluation.add(sample(anomalous=label), scored(score))
    metrics = evaluation.metrics(threshold)
    assert metrics == summarise(scores, kinds, threshold)
    assert metrics.image_auroc == pytest.approx(roc_auc_score(labels, scores))
    assert metrics.recall == pytest.approx(recall_score(labels, scores > threshold))
    assert metrics.false_alarm_rate == pytest.approx(1 - recall_score(~labels, scores <= threshold))
    assert metrics.pixel_auroc is None
    assert (metrics.normal_images, metrics.anomalous_images) == (np.sum(~labels), np.sum(labels))


def test_score_at_the_threshold_is_normal() -> None:
    metrics = summarise(np.array([1.0, 1.0, 1.5]), [None, "dent", "dent"], 1.0)
    assert (metrics.false_alarm_rate, metrics.recall) == (0.0, 0.5)


@pytest.mark.parametrize("anomalous", [False, True])
def test_metrics_that_need_the_absent_class_are_absent(*, anomalous: bool) -> None:
    metrics = summarise(np.array([1.0, 2.0]), ["dent" if anomalous else None] * 2, 1.5)
    assert metrics.image_auroc is None
    assert (metrics.recall is None) is not anomalous
    assert (metrics.false_alarm_rate is None) is anomalous
    assert set(metrics.intervals) == {"recall" if anomalous else "false_alarm_rate"}


def test_no_images_give_no_metrics() -> None:
    assert Evaluation().metrics(1.0) == EvaluationMetrics()


def test_scores_beyond_all_bounds_count_as_the_highest() -> None:
    metrics = summarise(np.array([1.0, np.inf, np.nan]), [None, "dent", "dent"], 2.0)
    assert (metrics.image_auroc, metrics.recall) == (1.0, 1.0)


def test_kinds_of_defect_are_measured_each_against_all_normal_images() -> None:
    scores = np.array([1.0, 2.0, 3.0, 1.5, 9.0, 8.0])
    metrics = summarise(scores, [None, None, None, "dent", "scratch", "scratch"], 2.5)
    dent, scratch = metrics.defects
    assert (dent.defect, dent.images, dent.recall) == ("dent", 1, 0.0)
    assert dent.image_auroc == pytest.approx(1 / 3)
    assert (scratch.defect, scratch.images, scratch.image_auroc, scratch.recall) == ("scratch", 2, 1.0, 1.0)
    assert scratch.intervals == {"recall": rate_interval(2, 2)}  # perfectly separated: no interval of the AUROC
    assert metrics.recall == pytest.approx(2 / 3)


def test_rates_have_their_binomial_intervals() -> None:
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.normal(0, 1, 50), generator.normal(2, 1, 30)])
    metrics = summarise(scores, [None] * 50 + ["dent"] * 30, 1.0)
    assert metrics.intervals["false_alarm_rate"] == rate_interval(int((scores[:50] > 1).sum()), 50)
    assert metrics.intervals["recall"] == rate_interval(int((scores[50:] > 1).sum()), 30)
    assert set(metrics.intervals) == {"image_auroc", "average_precision", "f1_max", "false_alarm_rate", "recall"}


def test_metrics_of_before_intervals_still_read() -> None:
    old = '{"image_auroc": 0.9, "pixel_auroc": null, "false_alarm_rate": 0.1, "recall": 0.8, "normal_images": 5}'
    metrics = EvaluationMetrics.model_validate_json(old)
    assert (metrics.image_auroc, metrics.aupro, metrics.intervals, metrics.defects) == (0.9, None, {}, ())


def test_metrics_read_back_as_they_were_written() -> None:
    metrics = summarise(np.array([1.0, 3.0, 2.0, 4.0]), [None, None, "dent", "dent"], 2.5)
    assert EvaluationMetrics.model_validate_json(metrics.model_dump_json()) == metrics


def write_mask(path: Path, side: int = SIDE) -> NDArray[np.bool_]:
    """Draw a defect that survives resizing; returned at the map's size."""
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : side // 2] = 255
    cv2.imwrite(str(path), mask)
    small = np.zeros((SIDE, SIDE), dtype=bool)
    small[SIDE // 4 : SIDE // 2, SIDE // 4 : SIDE // 2] = True
    return small


@pytest.mark.parametrize("side", [SIDE, 4 * SIDE])
def test_pixel_auroc_is_scikit_learn_s_over_normal_and_masked_images(tmp_path: Path, side: int) -> None:
    labels = write_mask(tmp_path / "mask.png", side)
    generator = np.random.default_rng(0)
    maps = [generator.random((SIDE, SIDE), np.float32).astype(np.float16).astype(np.float32) for _ in range(3)]
    maps[1] += labels
    evaluation = Evaluation()
    evaluation.add(sample(anomalous=False), scored(0, maps[0]))
    evaluation.add(sample(anomalous=True, mask=tmp_path / "mask.png"), scored(1, maps[1]))
    evaluation.add(sample(anomalous=True), scored(1, maps[2]))  # nobody drew where: no pixel of it counts
    truth = np.concatenate([np.zeros(SIDE * SIDE, dtype=bool), labels.ravel()])
    values = np.concatenate([maps[0].ravel(), maps[1].ravel()]).astype(np.float16)
    assert evaluation.metrics(0.5).pixel_auroc == pytest.approx(roc_auc_score(truth, values))


def test_map_beyond_float16_counts_as_the_highest(tmp_path: Path) -> None:
    labels = write_mask(tmp_path / "mask.png")
    evaluation = Evaluation()
    values = np.where(labels, np.float32(1e9), np.float32(1))
    evaluation.add(sample(anomalous=True, mask=tmp_path / "mask.png"), scored(1, values))
    assert evaluation.metrics(0.5).pixel_auroc == 1.0


def test_unreadable_mask_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken_mask.png").write_bytes(b"no mask")
    with pytest.raises(DatasetError, match=r"broken_mask\.png"):
        Evaluation().add(sample(anomalous=True, mask=tmp_path / "broken_mask.png"), scored(1))


def judged(
    folder: Path, *, score: float, anomalous: bool, name: str = "a.png", category: str = "bottle", threshold: float = 1
) -> JudgedImage:
    path = folder / name
    path.write_bytes(cv2.imencode(".png", np.full((40, 60, 3), 128, np.uint8))[1].tobytes())
    encoded = encode_map([np.full((32, 32), min(score, 60_000), np.float16)], (32, 32), MapCodec.GRID_F16, threshold)
    defect = "scratch" if anomalous else "good"
    return JudgedImage(path, category, defect, anomalous, score, threshold, encoded)


def report(folder: Path, images: Sequence[JudgedImage], metrics: Mapping[str, EvaluationMetrics] | None = None) -> str:
    path = folder / "new" / "report.html"
    write_report(path, "Title", images, metrics or {"bottle": EvaluationMetrics(image_auroc=0.875, recall=0.5)})
    return path.read_text(encoding="utf-8")


def test_report_is_one_file_that_refers_to_no_other(tmp_path: Path) -> None:
    page = report(tmp_path, [judged(tmp_path, score=0.5, anomalous=False), judged(tmp_path, score=2, anomalous=True)])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    assert not re.search(r"https?:|//[a-z]|<link|<script|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2 * 2 * 2  # worst and best, two images each, two pictures an image
    assert all(source.startswith("data:image/jpeg;base64,/9j/") for source in sources)
    assert "0.875" in page
    assert "50.0 %" in page


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)<"
    name = hostile + "\"' onerror=x>.png"
    images = [judged(tmp_path, score=2, anomalous=True, name=name, category=hostile)]
    page = report(tmp_path, images, {hostile: EvaluationMetrics()})
    reader = Tags()
    reader.feed(page)
    assert ("h2", ()) in reader.tags
    assert not any(tag == "script" for tag, _ in reader.tags)
    assert {names for tag, names in reader.tags if tag == "img"} == {("src", "alt")}
    assert page.count("&lt;script&gt;alert(1)&lt;&#34;&#39; onerror=x&gt;.png") == 6  # twice two texts and a caption


def test_name_that_is_no_utf_8_is_shown_somehow(tmp_path: Path) -> None:
    assert "a\\udcff.png" in report(tmp_path, [judged(tmp_path, score=2, anomalous=True, name="a\udcff.png")])


def test_wrong_verdicts_are_marked_and_listed(tmp_path: Path) -> None:
    page = report(
        tmp_path,
        [
            judged(tmp_path, score=0.5, anomalous=True, name="missed.png"),
            judged(tmp_path, score=2.0, anomalous=False, name="alarm.png"),
            judged(tmp_path, score=3.0, anomalous=True, name="found.png"),
            judged(tmp_path, score=0.1, anomalous=False, name="quiet.png"),
        ],
    )
    assert "Missed defects: 1 in all" in page
    assert "False alarms: 1 in all" in page
    figures = re.findall(r'<figure class="card.*?</figure>', page, re.DOTALL)
    for name in ("missed", "alarm", "found", "quiet"):
        shown = [figure for figure in figures if f"{name}.png" in figure]
        assert shown
        for figure in shown:
            wrong = name in ("missed", "alarm")
            assert figure.startswith('<figure class="card wrong">') is wrong
            assert ("judged <b>wrong</b>" in figure) is wrong


@pytest.mark.parametrize("scores", [[1.0], [1.0, 1.0, 1.0], [0.0], [float("inf"), 0.5], [1e-9, 1e9]])
@pytest.mark.parametrize("threshold", [0.0, 1.0, 7.5])
def test_histogram_bears_any_scores(tmp_path: Path, scores: list[float], threshold: float) -> None:
    images = [judged(tmp_path, score=score, anomalous=False, threshold=threshold) for score in scores]
    page = report(tmp_path, images)
    assert "nan" not in page.replace("nano", "").split("</style>")[1].split("<figure")[0]
    assert "inf" not in "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    bars = [float(height) for height in re.findall(r'<rect class="normal"[^>]* height="([^"]*)"', page)]
    assert 0 < max(bars) <= BOTTOM - TOP


def plots(page: str) -> dict[str, str]:
    found = re.findall(r'<figure class="plot">\s*<figcaption>(.*?)</figcaption>(.*?)</figure>', page, re.DOTALL)
    return dict(found)


def test_curves_are_drawn_where_both_classes_are_present(tmp_path: Path) -> None:
    normal = judged(tmp_path, score=0.5, anomalous=False)
    assert list(plots(report(tmp_path, [normal]))) == ["Scores"]
    both = plots(report(tmp_path, [normal, judged(tmp_path, score=2, anomalous=True)]))
    assert list(both) == ["ROC curve", "Precision and recall", "Scores"]


def test_operating_point_stands_where_the_threshold_puts_it(tmp_path: Path) -> None:
    """Of four normal images one is above the threshold, of two defective ones one: precision is a half."""
    scores = [(0.1, False), (0.2, False), (0.3, False), (1.5, False), (0.5, True), (3.0, True)]
    drawn = plots(report(tmp_path, [judged(tmp_path, score=score, anomalous=label) for score, label in scores]))
    for name, (x, y) in {"ROC curve": (0.25, 0.5), "Precision and recall": (0.5, 0.5)}.items():
        (at,) = re.findall(r'<circle class="marker" cx="([^"]*)" cy="([^"]*)"', drawn[name])
        assert float(at[0]) == pytest.approx(LEFT + x * (RIGHT - LEFT))
        assert float(at[1]) == pytest.approx(BOTTOM - y * (BOTTOM - TOP))
        assert "threshold 1<" in drawn[name]
        for label in re.findall(r'<text class="label".*?>(.*?)</text>', drawn[name]):
            assert re.match("false alarms|recall|precision", label)


def test_precision_without_an_alarm_is_not_marked(tmp_path: Path) -> None:
    images = [judged(tmp_path, score=score, anomalous=score > 1, threshold=9) for score in (0.5, 2.0)]
    assert "<circle" not in plots(report(tmp_path, images))["Precision and recall"]


def test_curve_of_many_images_stays_small() -> None:
    generator = np.random.default_rng(0)
    roc, *_ = plot_scores(generator.gamma(2, 1, 20_000), generator.random(20_000) < 0.3, 2.0)
    assert len(roc.curve) < 10_000


@pytest.mark.parametrize(("low", "high"), [(0.65, 4.5), (0.01, 300.0), (2.0, 2.2), (1e-3, 1e30), (0.98, 1.02)])
def test_logarithmic_axis_has_a_few_marks_within_it(low: float, high: float) -> None:
    ticks = plot_scores(np.array([low, high]), np.array([False, False]), low)[0].x_ticks
    assert 1 <= len(ticks) <= 6
    assert all(LEFT <= tick.at <= RIGHT for tick in ticks)


def test_intervals_kinds_and_versions_are_shown(tmp_path: Path) -> None:
    kind = DefectMetrics(defect="dent", images=7, recall=0.5, intervals={"recall": (0.1, 0.9)})
    first = EvaluationMetrics(image_auroc=0.75, recall=0.5, intervals={"image_auroc": (0.7, 0.8)}, defects=(kind,))
    second = EvaluationMetrics(image_auroc=0.85, recall=0.7)
    path = tmp_path / "report.html"
    write_report(path, "Title", [], {"bottle": first}, {"bottle": {"bottle@v2": first, "bottle@v1": second}})
    page = path.read_text()
    assert "0.700 to 0.800" in page
    assert "<td>dent</td><td>7</td><td>50.0 %<small>10.0 % to 90.0 %</small></td>" in page
    assert "0.800<small>± 0.071</small>" in page
    assert "60.0 %<small>± 14.1 %</small>" in page


def test_single_version_is_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, "Title", [], {"bottle": EvaluationMetrics()}, {"bottle": {"bottle@v2": EvaluationMetrics()}})
    assert "bottle@v2" in path.read_text()
    assert "seed" not in path.read_text()


def test_spread_is_of_the_metrics_that_all_versions_have() -> None:
    assert spread([EvaluationMetrics(image_auroc=0.5)]) == {}
    found = spread([EvaluationMetrics(image_auroc=0.5, recall=0.1), EvaluationMetrics(image_auroc=0.7)])
    assert found.keys() == {"image_auroc"}
    assert (found["image_auroc"].mean, found["image_auroc"].deviation) == pytest.approx((0.6, 0.1 * 2**0.5))


def test_category_without_images_is_reported(tmp_path: Path) -> None:
    assert "<h2>bottle</h2>" in report(tmp_path, [])


def test_image_judged_under_wider_limits_is_shown(tmp_path: Path) -> None:
    """As `limits.max_aspect` may have been raised."""
    image = judged(tmp_path, score=2, anomalous=True)
    image.path.write_bytes(cv2.imencode(".png", np.zeros((4, 400, 3), np.uint8))[1].tobytes())
    assert "a.png" in report(tmp_path, [image])


def test_overlay_is_hotter_where_the_map_is(tmp_path: Path) -> None:
    image = judged(tmp_path, score=0, anomalous=False)
    values = np.zeros((32, 32), np.float16)
    values[:, 16:] = 5
    image = replace(image, map=encode_map([values], (32, 32), MapCodec.GRID_F16, image.threshold))
    picture = overlay(image, np.full((32, 32, 3), 128, np.uint8)).astype(int)
    assert picture.shape == (32, 32, 3)
    red_less_blue = picture[..., 0] - picture[..., 2]
    assert red_less_blue[:, 16:].min() > red_less_blue[:, :16].max()


def test_overlay_bounds_the_defect_in_white(tmp_path: Path) -> None:
    write_mask(tmp_path / "mask.png", 128)
    image = judged(tmp_path, score=1, anomalous=True)
    pixels = np.full((32, 32, 3), 60, np.uint8)
    plain, outlined = overlay(image, pixels), overlay(replace(image, masks=[tmp_path / "mask.png"]), pixels)
    changed = (plain != outlined).any(axis=-1)
    assert (outlined[8:15, 8] == 255).all()
    assert changed[8:16, 8:16].any()
    assert not changed[20:, 20:].any()
    assert not changed[11:13, 11:13].any()  # what is inside stays to be seen


def test_score_that_is_no_number_is_an_alarm(tmp_path: Path) -> None:
    image = replace(judged(tmp_path, score=1, anomalous=True), score=float("nan"))
    assert image.is_alarm
    assert not image.is_wrong


def test_training_report_has_the_loss_of_each_epoch_and_suspect_images_first(tmp_path: Path) -> None:
    scores = [0.2, 0.9, 0.5, *[0.1] * 8]
    held_out = [judged(tmp_path, score=score, anomalous=False, name=f"part-{k}.png") for k, score in enumerate(scores)]
    course = TrainingCourse([1.0, 0.75, 0.5], held_out)
    page = training_report("bottle@v1", course, [], EvaluationMetrics()).decode()
    assert "Loss while training" in page
    assert [int(k) for k in re.findall(r"<figcaption>part-(\d+)\.png", page)][:3] == [1, 2, 0]
    assert page.count("<figcaption>part-") == 8
    assert "scores are of 11 normal images" in page
    assert "Test images" not in page


def test_training_report_shows_test_images_beside_the_training(tmp_path: Path) -> None:
    test = [judged(tmp_path, score=0.5, anomalous=False), judged(tmp_path, score=2, anomalous=True)]
    page = training_report("bottle@v1", TrainingCourse([1.0], test[:1]), test, EvaluationMetrics(recall=1.0)).decode()
    assert "<h3>Test images</h3>" in page
    assert "ROC curve" in page


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_loss_curve_stays_inside_the_plot(losses: list[float]) -> None:
    plot = plot_losses(losses)
    assert plot is not None
    points = [tuple(map(float, point.split(","))) for point in plot.curve.lstrip("M").split("L")]
    assert len(points) == len(losses)
    assert all(LEFT - 0.1 <= x <= RIGHT + 0.1 and TOP - 0.1 <= y <= BOTTOM + 0.1 for x, y in points)
    assert all(TOP - 0.1 <= tick.at <= BOTTOM + 0.1 for tick in plot.y_ticks)
    assert 2 <= len(plot.y_ticks) <= 8
    assert [tick.text for tick in plot.x_ticks][:1] == ["1"]


def test_loss_that_is_never_finite_has_no_curve() -> None:
    assert plot_losses([float("nan"), float("inf")]) is None
