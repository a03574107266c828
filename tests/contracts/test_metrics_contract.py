"""What every `Metrics` does: in prometheus-client, through Ray, and where nobody watches."""

from collections.abc import Mapping
from typing import Any, Protocol

import pytest
from helpers.scraped import collected
from prometheus_client import CollectorRegistry
from ray.util import metrics as ray_metrics

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import ALL, NO_METRICS, Counter, Gauge, Histogram, Metric, Metrics
from flawstream.telemetry.prometheus import PrometheusMetrics
from serving.ray_metrics import RayMetrics

MOST_CATEGORIES = 2
ALMOST_NOTHING = pytest.approx(0, abs=1e-300)
"""Ray's counters take no 0: a line is made with the least number there is."""


class World(Protocol):
    """Metrics, and what whoever looks at them sees."""

    metrics: Metrics

    def value(self, metric: Metric, **labels: str) -> float | None:
        """Give a counter's count or a gauge's value; None where there is no such line."""
        ...

    def observed(self, histogram: Histogram, **labels: str) -> tuple[int, float]:
        """Give how many values a histogram has, and their sum."""
        ...


class MetricsContract:
    """The law for whoever is given numbers."""

    @pytest.mark.parametrize("metric", ALL, ids=lambda one: one.name)
    def test_every_metric_is_taken(self, world: World, metric: Metric) -> None:
        labels = dict.fromkeys(metric.labels, "x")
        match metric:
            case Counter():
                world.metrics.add(metric, **labels)
                world.metrics.add(metric, 0, **labels)
            case Gauge():
                world.metrics.set(metric, -1.5, **labels)
            case Histogram():
                world.metrics.observe(metric, 0.5, **labels)

    @pytest.mark.parametrize(
        "gauge", [one for one in ALL if isinstance(one, Gauge) and one.labels], ids=lambda one: one.name
    )
    def test_what_labels_name_may_be_forgotten_and_set_again(self, world: World, gauge: Gauge) -> None:
        labels = dict.fromkeys(gauge.labels, "x")
        for _ in range(2):
            world.metrics.set(gauge, 1, **labels)
            world.metrics.forget(gauge, **labels)

    def test_what_was_never_set_may_be_forgotten(self, world: World) -> None:
        world.metrics.forget(m.MODEL_INFO, category="bottle", version="v1")


class WatchedMetricsContract(MetricsContract):
    """The law for whoever keeps them as well."""

    def test_counts_add_up_for_each_set_of_labels(self, world: World) -> None:
        for amount, verdict in ((1, "normal"), (2.5, "normal"), (4, "anomalous")):
            world.metrics.add(m.RESULTS, amount, category="bottle", verdict=verdict)
        assert world.value(m.RESULTS, category="bottle", verdict="normal") == 3.5
        assert world.value(m.RESULTS, category="bottle", verdict="anomalous") == 4

    def test_a_count_is_one_where_nothing_else_is_said(self, world: World) -> None:
        world.metrics.add(m.RESULTS, category="bottle", verdict="normal")
        assert world.value(m.RESULTS, category="bottle", verdict="normal") == 1

    def test_an_amount_of_0_makes_no_line(self, world: World) -> None:
        world.metrics.add(m.RESULTS, 0, category="bottle", verdict="normal")
        assert world.value(m.RESULTS, category="bottle", verdict="normal") is None

    @pytest.mark.parametrize("counter", [one for one in ALL if isinstance(one, Counter)], ids=lambda one: one.name)
    def test_counters_of_closed_sets_are_there_from_0(self, world: World, counter: Counter) -> None:
        for labels in counter.lines():
            assert world.value(counter, **labels) == ALMOST_NOTHING
            world.metrics.add(counter, 3, **labels)
            assert world.value(counter, **labels) == 3

    def test_a_gauge_is_what_was_set_last(self, world: World) -> None:
        for value in (5, -2.5, 3):
            world.metrics.set(m.BACKLOG_IMAGES, value)
        assert world.value(m.BACKLOG_IMAGES) == 3

    def test_a_gauge_that_was_set_to_0_is_there(self, world: World) -> None:
        assert world.value(m.STREAM_UP) is None
        world.metrics.set(m.STREAM_UP, 0)
        assert world.value(m.STREAM_UP) == 0

    def test_a_histogram_has_every_value(self, world: World) -> None:
        for value in (0.5, 0.25, 100):
            world.metrics.observe(m.STAGE_SECONDS, value, stage="read")
        world.metrics.observe(m.STAGE_SECONDS, 1, stage="publish")
        assert world.observed(m.STAGE_SECONDS, stage="read") == (3, 100.75)

    def test_what_is_forgotten_is_gone_or_0_and_its_neighbours_stay(self, world: World) -> None:
        for version in ("v1", "v2"):
            world.metrics.set(m.MODEL_INFO, 1, category="bottle", version=version)
        world.metrics.forget(m.MODEL_INFO, category="bottle", version="v1")
        assert world.value(m.MODEL_INFO, category="bottle", version="v1") in (None, 0)
        assert world.value(m.MODEL_INFO, category="bottle", version="v2") == 1

    def test_categories_past_the_bound_are_one_together(self, world: World) -> None:
        for category in ("bottle", "cable", "tile", "wood", "bottle"):
            world.metrics.add(m.RESULTS, category=category, verdict="normal")
            world.metrics.set(m.THRESHOLD, 2, category=category)
            world.metrics.observe(m.P_VALUE, 0.5, category=category)
        counts = {
            category: world.value(m.RESULTS, category=category, verdict="normal")
            for category in ("bottle", "cable", "tile", "wood", m.OTHER)
        }
        assert counts == {"bottle": 2, "cable": 1, "tile": None, "wood": None, m.OTHER: 2}
        assert (world.value(m.THRESHOLD, category="tile"), world.value(m.THRESHOLD, category=m.OTHER)) == (None, 2)
        assert world.observed(m.P_VALUE, category=m.OTHER) == (2, 1.0)


class TestNoMetrics(MetricsContract):
    @pytest.fixture
    def world(self) -> World:
        return PrometheusWorld(NO_METRICS)


class PrometheusWorld:
    def __init__(self, metrics: Metrics | None = None) -> None:
        self._registry = CollectorRegistry()
        self.metrics = metrics or PrometheusMetrics(self._registry, MOST_CATEGORIES)

    def value(self, metric: Metric, **labels: str) -> float | None:
        return collected(self._registry).most(metric.name, **labels)

    def observed(self, histogram: Histogram, **labels: str) -> tuple[int, float]:
        found = collected(self._registry)
        count = int(found.total(f"{histogram.name}_count", **labels))
        return count, found.total(f"{histogram.name}_sum", **labels)


class TestPrometheusMetrics(WatchedMetricsContract):
    @pytest.fixture
    def world(self) -> World:
        return PrometheusWorld()


class RayCore:
    """Stands in for the part of Ray that is not Python, which needs a cluster: it keeps what it is given."""

    def __init__(self) -> None:
        self.recorded: dict[str, list[tuple[Mapping[str, str], float]]] = {}

    def make(self, name: str, *_: Any) -> "RayCoreMetric":
        return RayCoreMetric(self.recorded.setdefault(name, []))


class RayCoreMetric:
    def __init__(self, recorded: list[tuple[Mapping[str, str], float]]) -> None:
        self._recorded = recorded

    def record(self, value: float, tags: Mapping[str, str]) -> None:
        self._recorded.append((dict(tags), value))


class RayWorld:
    """Ray's own checks of what it is given are the real ones; `integration/test_ray_scrape.py` asks a real agent."""

    def __init__(self, core: RayCore) -> None:
        self._core = core
        self.metrics: Metrics = RayMetrics(MOST_CATEGORIES)

    def _given(self, metric: Metric, labels: dict[str, str]) -> list[float]:
        return [value for tags, value in self._core.recorded[metric.name] if tags == labels]

    def value(self, metric: Metric, **labels: str) -> float | None:
        given = self._given(metric, labels)
        if not given:
            return None
        return sum(given) if isinstance(metric, Counter) else given[-1]

    def observed(self, histogram: Histogram, **labels: str) -> tuple[int, float]:
        given = self._given(histogram, labels)
        return len(given), sum(given)


class TestRayMetrics(WatchedMetricsContract):
    @pytest.fixture
    def world(self, monkeypatch: pytest.MonkeyPatch) -> World:
        core = RayCore()
        for name in ("CythonCount", "CythonGauge", "CythonHistogram", "CythonSum"):
            monkeypatch.setattr(ray_metrics, name, core.make)
        return RayWorld(core)
