"""Drift as its metrics tell it: nothing where the line is as calibrated, much where it is not."""

import numpy as np
import pytest
from helpers.fakes import make_result
from helpers.scraped import collected
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from scipy.stats import kstest

from flawstream.calibration import p_values
from flawstream.telemetry import metrics as m
from flawstream.telemetry.prometheus import PrometheusMetrics
from workers.observe.drift import DriftMonitor, distance_from_uniform


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def make_monitor(registry: CollectorRegistry, *, window_images: int = 500, max_categories: int = 10) -> DriftMonitor:
    return DriftMonitor(PrometheusMetrics(registry, max_categories), window_images, max_categories)


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=50))
def test_distance_is_that_of_scipy(shares: list[float]) -> None:
    expected = kstest(np.array(shares), "uniform").statistic
    assert distance_from_uniform(np.array(shares)) == pytest.approx(expected, abs=1e-12)


def drift(registry: CollectorRegistry, shift: float, defects: float = 0.0) -> float:
    """Calibrate on 200 scores, then judge 500 that are shifted by so many standard deviations."""
    rng = np.random.default_rng(7)
    calibration = np.sort(rng.normal(size=200))
    scores = rng.normal(size=500) + shift
    scores[: int(500 * defects)] += 10
    monitor = make_monitor(registry)
    for number, (score, share) in enumerate(zip(scores, p_values(calibration, scores), strict=True)):
        monitor.add(make_result(str(number), score=float(score), p_value=float(share)))
    monitor.report()
    distance = collected(registry).most(m.DRIFT_DISTANCE.name, category="bottle")
    assert distance is not None
    return distance


@pytest.mark.parametrize(
    ("shift", "least", "most"), [(0.0, 0.0, 0.1), (1.0, 0.3, 0.5), (-1.0, 0.3, 0.5), (4.0, 0.9, 1)]
)
def test_distance_grows_with_a_shift_of_the_scores_in_either_direction(
    registry: CollectorRegistry, shift: float, least: float, most: float
) -> None:
    assert least <= drift(registry, shift) <= most


def test_a_tenth_of_defective_parts_moves_the_distance_by_no_more_than_a_tenth(registry: CollectorRegistry) -> None:
    assert drift(registry, shift=0.0, defects=0.1) <= drift(CollectorRegistry(), shift=0.0) + 0.1


def test_another_version_of_the_model_begins_its_window_anew(registry: CollectorRegistry) -> None:
    monitor = make_monitor(registry)
    for number in range(30):
        monitor.add(make_result(str(number), p_value=0.01))
    monitor.add(make_result("30", p_value=0.5, model="bottle@v2", threshold=7.0, score=3.0))
    monitor.report()
    told = collected(registry)
    assert told.most(m.WINDOW_IMAGES.name, category="bottle") == 1
    assert told.most(m.THRESHOLD.name, category="bottle") == 7.0
    assert told.most(m.DRIFT_DISTANCE.name, category="bottle") == 0.5
    assert told.most(m.WINDOW_SCORE.name, category="bottle", share="0.95") == 3.0


def test_window_holds_the_latest_images_only(registry: CollectorRegistry) -> None:
    monitor = make_monitor(registry, window_images=20)
    for number in range(100):
        monitor.add(make_result(str(number), score=float(number)))
    monitor.report()
    told = collected(registry)
    assert told.most(m.WINDOW_IMAGES.name) == 20
    assert told.most(m.WINDOW_SCORE.name, share="0.5") == 89.5
    assert told.total(f"{m.P_VALUE.name}_count", category="bottle") == 100


def test_categories_past_the_bound_have_no_window_and_their_p_values_are_of_other(registry: CollectorRegistry) -> None:
    monitor = make_monitor(registry, max_categories=2)
    for category in ("bottle", "cable", "tile"):
        monitor.add(make_result(category, category=category, model=f"{category}@v1"))
    monitor.report()
    told = collected(registry)
    assert {sample.labels["category"] for sample in told.matching(m.WINDOW_IMAGES.name)} == {"bottle", "cable"}
    assert told.total(f"{m.P_VALUE.name}_count", category="other") == 1
