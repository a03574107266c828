"""Conformal thresholds and p-values: they agree with each other, and they keep what they promise."""

import logging
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flawstream.calibration import calibrate, fewest_images, p_values, shortage
from schemas.errors import ConfigError, ShapeError
from schemas.manifest import Calibration

rates = st.floats(1e-6, 1 - 1e-6) | st.integers(2, 1000).map(lambda k: 1 / k) | st.sampled_from([0.05, 0.1, 0.01, 0.3])
finite = st.floats(-1e6, 1e6, width=32)
# Few distinct values, so that ties are common.
score_vectors = npst.arrays(np.float32, st.integers(1, 60), elements=finite | st.integers(0, 3).map(float))
with_enough_images = score_vectors.flatmap(
    lambda scores: st.tuples(st.just(scores), st.floats(1 / (scores.size + 1), 0.999) | st.just(1 / (scores.size + 1)))
)
with_too_few_images = score_vectors.flatmap(
    lambda scores: st.tuples(st.just(scores), st.floats(1e-6, 1 / (scores.size + 1), exclude_max=True))
)


@given(with_enough_images, st.lists(finite, max_size=8))
def test_score_is_above_the_threshold_if_and_only_if_p_is_at_most_the_rate(
    drawn: tuple[np.ndarray, float], others: list[float]
) -> None:
    calibration_scores, rate = drawn
    assert calibration_scores.size >= fewest_images(rate)
    calibration = calibrate(calibration_scores, calibration_scores, rate, 0.03)
    scores = np.concatenate([calibration_scores, np.asarray(others, np.float32)])
    p = p_values(np.asarray(calibration.scores), scores)
    assert ((scores > calibration.threshold) == (p <= rate)).all()


@given(with_too_few_images)
def test_with_too_few_images_no_calibration_image_is_above_the_threshold(drawn: tuple[np.ndarray, float]) -> None:
    scores, rate = drawn
    assert scores.size < fewest_images(rate)
    assert calibrate(scores, scores, rate, 0.03).threshold == scores.max()


@given(st.integers(1, 500), st.integers(1, 99))
def test_threshold_is_the_split_conformal_quantile(count: int, percent: int) -> None:
    scores = np.random.default_rng(count).permutation(count).astype(np.float64)
    rank = math.ceil((count + 1) * (1 - Fraction(percent, 100)))
    calibration = calibrate(scores, -scores, percent / 100, 0.0)
    assert calibration.threshold == np.sort(scores)[min(rank, count) - 1]
    assert calibration.pixel_threshold == np.sort(-scores)[min(rank, count) - 1]


@given(score_vectors, npst.arrays(np.float32, st.integers(0, 20), elements=finite))
def test_p_value_counts_the_calibration_images_at_least_as_anomalous(
    calibration_scores: np.ndarray, scores: np.ndarray
) -> None:
    expected = [(1 + np.count_nonzero(calibration_scores >= s)) / (calibration_scores.size + 1) for s in scores]
    p = p_values(np.sort(calibration_scores), scores)
    assert p.dtype == np.float64
    np.testing.assert_array_equal(p, expected)
    assert ((p > 0) & (p <= 1)).all()


def test_not_a_number_is_the_most_anomalous_of_all() -> None:
    assert p_values(np.asarray([1.0, 2.0]), np.asarray([np.nan]))[0] == 1 / 3


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.3])
def test_normal_images_are_called_anomalous_no_more_often_than_asked(rate: float) -> None:
    rng = np.random.default_rng(7)
    alarms = []
    for _ in range(400):  # the promise is an average over calibration sets
        calibration = calibrate(rng.gamma(2.0, size=60), rng.gamma(2.0, size=60), rate, 0.03)
        alarms.append(np.mean(rng.gamma(2.0, size=200) > calibration.threshold))
    deviation = np.std(alarms) / math.sqrt(len(alarms))
    assert np.mean(alarms) <= rate + 3 * deviation
    assert np.mean(alarms) >= rate - 1 / 61 - 3 * deviation  # nor much less often: the test keeps its power


@given(rates)
def test_fewest_images_is_the_least_number_that_can_reach_the_rate(rate: float) -> None:
    needed = fewest_images(rate)
    assert 1 / (needed + 1) <= rate
    assert 1 / needed > rate


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.3, 3), (1 / 49, 48), (0.999, 1)])
def test_fewest_images_of_common_rates(rate: float, needed: int) -> None:
    assert fewest_images(rate) == needed


def test_shortage_says_how_many_images_are_needed_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert shortage(19, 0.05) is None
    with caplog.at_level(logging.WARNING):
        calibrate(np.arange(19.0), np.arange(19.0), 0.05, 0.03)
        assert not caplog.records
        calibrate(np.arange(18.0), np.arange(18.0), 0.05, 0.03)
    assert "needs 19 calibration images and there are 18" in caplog.text


@given(score_vectors, rates)
def test_calibration_survives_json_to_the_last_bit(scores: np.ndarray, rate: float) -> None:
    calibration = calibrate(scores, scores, rate, 0.03)
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration
    assert list(calibration.scores) == sorted(scores.tolist())


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_rate_outside_zero_and_one_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="false_alarm_rate"):
        calibrate(np.ones(5), np.ones(5), rate, 0.03)
    with pytest.raises(ConfigError, match="false_alarm_rate"):
        fewest_images(rate)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_score_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match=r"1 of 3 .*diverged"):
        calibrate(np.asarray([1.0, bad, 2.0]), np.ones(3), 0.05, 0.03)
    with pytest.raises(ConfigError, match=r"1 of 3 .*diverged"):
        calibrate(np.ones(3), np.asarray([1.0, bad, 2.0]), 0.05, 0.03)


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((3,), (2,)), ((3, 1), (3, 1))])
def test_vectors_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ShapeError):
        calibrate(np.ones(shapes[0]), np.ones(shapes[1]), 0.05, 0.03)
