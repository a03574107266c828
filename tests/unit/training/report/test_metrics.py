"""Metrics against scikit-learn, torchmetrics, plain threshold sweeps and cases one can work out by hand."""

import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_precision_recall_curve,
)

from training.report.metrics import CONFIDENCE, PixelTally, aupro, auroc, image_metrics, rate_interval

SIDE = 24
labelled_scores = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=60).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)
"""Whole numbers: many ties."""


def unzip(pairs: list[tuple[int, bool]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return np.array([score for score, _ in pairs], float), np.array([label for _, label in pairs])


@given(labelled_scores)
def test_image_metrics_are_scikit_learn_s(pairs: list[tuple[int, bool]]) -> None:
    scores, labels = unzip(pairs)
    values, _ = image_metrics(scores, labels)
    precision, recall, _ = precision_recall_curve(labels, scores)
    best = max(2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True) if p + r)
    assert values["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert values["average_precision"] == pytest.approx(average_precision_score(labels, scores))
    assert values["f1_max"] == pytest.approx(best)


@given(labelled_scores)
def test_image_metrics_are_torchmetrics_s(pairs: list[tuple[int, bool]]) -> None:
    scores, labels = unzip(pairs)
    values, _ = image_metrics(scores, labels)
    given_scores, target = torch.from_numpy(scores / 12), torch.from_numpy(labels.astype(np.int64))
    precision, recall, _ = binary_precision_recall_curve(given_scores, target)
    assert values["image_auroc"] == pytest.approx(binary_auroc(given_scores, target).item(), abs=1e-6)
    assert values["average_precision"] == pytest.approx(binary_average_precision(given_scores, target).item(), abs=1e-6)
    best = torch.nan_to_num(2 * precision * recall / (precision + recall)).max().item()
    assert values["f1_max"] == pytest.approx(best, abs=1e-6)


def test_scores_that_are_not_finite_are_tied_at_the_top() -> None:
    scores, labels = np.array([1.0, 2.0, np.inf, np.nan, -np.inf]), np.array([False, False, True, True, True])
    assert image_metrics(scores, labels)[0] == {"image_auroc": 1.0, "average_precision": 1.0, "f1_max": 1.0}


def test_one_class_has_neither_values_nor_intervals() -> None:
    assert image_metrics(np.array([1.0, 2.0]), np.array([True, True])) == ({}, {})
    assert image_metrics(np.array([]), np.array([], dtype=bool)) == ({}, {})


def test_only_the_metrics_asked_for_are_computed() -> None:
    values, intervals = image_metrics(
        np.array([1.0, 3.0, 2.0, 4.0]), np.array([False, False, True, True]), ["image_auroc"]
    )
    assert set(values) == set(intervals) == {"image_auroc"}


def two_normals(count: int, seed: int, shift: float = 1.0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3 == 0
    return generator.normal(size=count) + shift * labels, labels


def test_intervals_hold_the_values_and_are_the_same_every_time() -> None:
    scores, labels = two_normals(200, seed=0)
    values, intervals = image_metrics(scores, labels)
    assert set(values) == set(intervals)
    assert all(low < values[name] < high for name, (low, high) in intervals.items())
    assert image_metrics(scores, labels)[1] == intervals


def test_interval_of_the_auroc_is_that_of_scikit_learn_over_resamples_within_each_class() -> None:
    scores, labels = two_normals(120, seed=1)
    generator = np.random.default_rng(5)
    areas = []
    for _ in range(1000):
        rows = np.concatenate(
            [generator.choice(np.flatnonzero(labels == one), (labels == one).sum()) for one in (False, True)]
        )
        areas.append(roc_auc_score(labels[rows], scores[rows]))
    assert image_metrics(scores, labels)[1]["image_auroc"] == pytest.approx(np.percentile(areas, [2.5, 97.5]), abs=0.01)


def test_interval_of_the_auroc_covers_the_truth_as_often_as_it_says() -> None:
    truth = 0.7602499389065233  # P(N(1, 1) > N(0, 1))
    covered = 0
    for seed in range(200):
        low, high = image_metrics(*two_normals(150, seed), ["image_auroc"])[1]["image_auroc"]
        covered += low <= truth <= high
    low, high = (int(binom.ppf(q, 200, CONFIDENCE - 0.01)) for q in (0.001, 0.9999))  # a percentile is a little short
    assert low <= covered <= high


def test_perfect_separation_has_no_interval() -> None:
    values, intervals = image_metrics(np.arange(40.0), np.arange(40) >= 20)
    assert values["image_auroc"] == 1.0
    assert intervals == {}


def test_many_images_are_resampled_in_bounded_memory() -> None:
    scores, labels = two_normals(30_000, seed=0)
    tracemalloc.start()
    image_metrics(scores[:6_000], labels[:6_000], ["image_auroc"])
    _, some = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    image_metrics(scores, labels, ["image_auroc"])
    _, more = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert more < 1.5 * some


@pytest.mark.parametrize("count", [1, 7, 60])
def test_interval_of_a_rate_is_exact(count: int) -> None:
    """At each end, the count seen or one more extreme has a probability of 2.5 %."""
    for hits in range(count + 1):
        low, high = rate_interval(hits, count)
        assert binom.sf(hits - 1, count, low) == pytest.approx(0.025) if hits else low == 0.0
        assert binom.cdf(hits, count, high) == pytest.approx(0.025) if hits < count else high == 1.0


def test_no_false_alarm_in_sixty_images_still_allows_for_six_percent() -> None:
    assert rate_interval(0, 60) == pytest.approx((0.0, 1 - 0.025 ** (1 / 60)))


def test_area_of_resamples_is_computed_row_by_row() -> None:
    positives, negatives = np.array([[2, 1, 0], [0, 0, 3]]), np.array([[0, 1, 2], [3, 0, 0]])
    np.testing.assert_allclose(auroc(positives, negatives), [(3 * 2 + 2 + 0.5) / 9, 0.0])


# AUPRO


def plain_aupro(maps: list[NDArray[np.float32]], masks: list[NDArray[np.bool_] | None], limit: float = 0.3) -> float:
    """Sweep every threshold over every map, as the definition reads."""
    regions = []
    for values, mask in zip(maps, masks, strict=True):
        if mask is not None:
            count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
            regions += [values[labels == k] for k in range(1, count)]
    normal = np.concatenate([v.ravel() if m is None else v[~m] for v, m in zip(maps, masks, strict=True)])
    thresholds = [np.inf, *sorted({float(value) for values in maps for value in values.ravel()}, reverse=True)]
    curve = [
        (float((normal >= threshold).mean()), float(np.mean([(one >= threshold).mean() for one in regions])))
        for threshold in thresholds
    ]
    alarms, overlap = np.array(curve).T
    end = float(np.interp(limit, alarms, overlap))  # at a vertical step np.interp takes its top, where it is left
    inside = alarms < limit
    return float(np.trapezoid([*overlap[inside], end], [*alarms[inside], limit]) / limit)


def tally(maps: list[NDArray[np.float32]], masks: list[NDArray[np.bool_] | None]) -> PixelTally:
    made = PixelTally()
    for values, mask in zip(maps, masks, strict=True):
        made.add(values, mask)
    return made


def random_set(
    seed: int, images: int = 6, levels: int = 40
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.bool_] | None]]:
    """Make maps of few distinct values, every other image with some blobs where they are higher."""
    generator = np.random.default_rng(seed)
    maps, masks = [], []
    for number in range(images):
        values = generator.integers(0, levels, (SIDE, SIDE)) / np.float32(8)
        mask = cv2.resize(generator.random((6, 6)).astype(np.float32), (SIDE, SIDE)) > 0.75 if number % 2 else None
        if mask is not None:
            values = values + mask * generator.random() * 2
        maps.append(values.astype(np.float16).astype(np.float32))
        masks.append(mask)
    return maps, masks


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [2, 40, 4000])
def test_metrics_of_pixels_are_those_of_plain_sweeps(seed: int, levels: int) -> None:
    maps, masks = random_set(seed, levels=levels)
    values, _ = tally(maps, masks).metrics()
    truth = np.concatenate(
        [(np.zeros_like(v, bool) if m is None else m).ravel() for v, m in zip(maps, masks, strict=True)]
    )
    pixels = np.concatenate([v.ravel() for v in maps])
    assert values["aupro"] == pytest.approx(plain_aupro(maps, masks), abs=1e-9)
    assert values["pixel_auroc"] == pytest.approx(roc_auc_score(truth, pixels), abs=1e-9)
    assert values["pixel_auroc"] == pytest.approx(
        binary_auroc(torch.from_numpy(pixels / pixels.max()), torch.from_numpy(truth.astype(np.int64))).item(), abs=1e-5
    )


def test_metrics_of_pixels_are_near_those_of_unrounded_maps() -> None:
    generator = np.random.default_rng(0)
    maps = [generator.gamma(2, 0.5, (SIDE, SIDE)).astype(np.float32) for _ in range(6)]
    masks = random_set(1)[1]
    values, _ = tally(maps, masks).metrics()
    assert values["aupro"] == pytest.approx(plain_aupro(maps, masks), abs=1e-4)


def strip(*values: float) -> NDArray[np.float32]:
    return np.array([values], np.float32)


def where(*marks: int) -> NDArray[np.bool_]:
    return np.array([marks], dtype=bool)


def test_perfect_map_has_all_overlap_before_the_first_false_alarm() -> None:
    values, _ = tally([strip(1, 9, 1, 1)], [where(0, 1, 0, 0)]).metrics()
    assert values == {"pixel_auroc": 1.0, "aupro": 1.0}


def test_inverted_map_has_no_overlap_before_the_limit() -> None:
    values, _ = tally([strip(9, 1, 9, 9)], [where(0, 1, 0, 0)]).metrics()
    assert values == {"pixel_auroc": 0.0, "aupro": 0.0}


def test_flat_map_has_the_overlap_of_chance() -> None:
    """The curve is the diagonal: its area up to 0.3 is 0.3 * 0.3 / 2, a share of 0.15."""
    values, _ = tally([strip(1, 1, 1, 1)], [where(0, 1, 0, 0)]).metrics()
    assert values == pytest.approx({"pixel_auroc": 0.5, "aupro": 0.15})


def test_large_and_small_region_count_the_same() -> None:
    """A region of six pixels is found at once and one of one pixel never before the limit: half the overlap."""
    marks = (1, 1, 1, 1, 1, 1, 0, 1, 0, 0)
    values, _ = tally([strip(9, 9, 9, 9, 9, 9, 5, 1, 5, 5)], [where(*marks)]).metrics()
    assert values["aupro"] == pytest.approx(0.5)
    assert values["pixel_auroc"] == pytest.approx(6 / 7)


def test_curve_is_cut_between_its_points() -> None:
    """One level of all overlap and half the normal pixels: a line to (0.5, 1), 0.6 high at the limit."""
    assert aupro(np.array([1.0, 0.0]), np.array([5, 5])) == pytest.approx(0.6 / 2)
    assert aupro(np.array([1.0, 0.0]), np.array([5, 5]), limit=1.0) == pytest.approx(0.75)


def test_pixels_that_touch_across_a_corner_are_one_region() -> None:
    values = np.array([[9, 1], [1, 1]], np.float32)
    mask = np.array([[True, False], [False, True]])
    assert tally([values], [mask]).metrics()[0]["aupro"] == pytest.approx(0.5 + 0.5 * 0.15)


def test_normal_images_bear_on_the_false_positive_rate() -> None:
    marked, quiet, loud = strip(9, 1, 1, 1), strip(1, 1, 1, 1), strip(99, 99, 99, 99)
    mask = where(1, 0, 0, 0)
    assert tally([marked, quiet], [mask, None]).metrics()[0]["aupro"] == 1.0
    assert tally([marked, loud], [mask, None]).metrics()[0]["aupro"] == 0.0


@pytest.mark.parametrize("worst", [np.inf, np.nan, 1e9])
def test_pixel_beyond_all_bounds_counts_as_the_highest(worst: float) -> None:
    values, _ = tally([strip(60_000, 1, worst, 1)], [where(0, 0, 1, 0)]).metrics()
    assert values == {"pixel_auroc": 1.0, "aupro": 1.0}


def test_values_below_zero_are_in_order() -> None:
    values, _ = tally([strip(-5, -0.25, 0.0, -0.0, 3)], [where(0, 0, 0, 1, 1)]).metrics()
    assert values["pixel_auroc"] == pytest.approx((3 + 2.5) / 6)


def test_no_masks_no_metrics_of_pixels() -> None:
    assert PixelTally().metrics() == ({}, {})
    assert tally([strip(1, 2)], [None]).metrics() == ({}, {})
    assert tally([strip(1, 2), strip(1, 2)], [None, where(0, 0)]).metrics() == ({}, {})


def test_intervals_of_pixels_are_those_of_resampled_images() -> None:
    maps, masks = random_set(3, images=24)
    values, intervals = tally(maps, masks).metrics()
    generator = np.random.default_rng(9)
    drawn = []
    for _ in range(100):
        rows = np.concatenate([2 * generator.integers(0, 12, 12), 2 * generator.integers(0, 12, 12) + 1])
        drawn.append(tally([maps[row] for row in rows], [masks[row] for row in rows]))
    sums = [one._overlap for one in drawn], [one._positives for one in drawn], [one._negatives for one in drawn]  # noqa: SLF001 - its own resampling would be repeated for each
    overlap, positives, negatives = (np.stack(one).astype(np.float64) for one in sums)
    for name, areas in (("aupro", aupro(overlap, negatives)), ("pixel_auroc", auroc(positives, negatives))):
        low, high = intervals[name]
        assert low < values[name] < high
        assert (low, high) == pytest.approx(np.percentile(areas, [2.5, 97.5]), abs=0.25 * (high - low))


def test_pixels_take_no_memory_but_that_of_their_histograms() -> None:
    made = PixelTally()
    generator = np.random.default_rng(0)
    values = generator.random((256, 256), np.float32)
    made.add(values, None)
    tracemalloc.start()
    for _ in range(20):
        made.add(values, None)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20 * 17_000
