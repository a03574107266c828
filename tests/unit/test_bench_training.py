"""The figures of `bench.training` from what was measured."""

import pytest

from bench.training import compare, growth
from schemas.settings import TrainingSettings


def test_growth_is_that_of_a_line_through_the_costs() -> None:
    assert growth([2.0, 2.0, 2.0]) == pytest.approx(0)
    assert growth([2.0, 2.1, 2.2]) == pytest.approx(0.1)
    assert growth([2.0, 2.4, 2.0, 2.4, 2.0]) == pytest.approx(0)  # an outlier is not the last's cost
    assert growth([1.0]) == 0


def test_what_is_done_once_is_spread_over_the_epochs_of_a_default_run() -> None:
    once_s = float(TrainingSettings().epochs)
    found = compare({"features_s": once_s, "statistics_s": once_s, "epochs_s": [1, 3]}, {"epochs_s": [16]}, images=1000)
    assert found["ratio"] == pytest.approx(16 / (2 + 2))
    assert found["ratio_without_features"] == pytest.approx(8)
    assert found["ours_ms"] == pytest.approx(4)
    assert found["theirs_ms"] == pytest.approx(16)
