"""What metrics there are: their names, their table in the documentation, and prometheus-client's way with them."""

import re

import pytest
from helpers.places import ROOT
from helpers.prometheus_server import needs_prometheus, promtool
from helpers.scraped import collected
from prometheus_client import CollectorRegistry, generate_latest

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import ALL, CategoryLabels, Counter, Gauge, Histogram, Metric
from flawstream.telemetry.prometheus import PrometheusMetrics
from schemas.errors import Reason

TABLE = ROOT / "docs/reference/metrics.md"
_ROW = re.compile(r"^\| `(flawstream_\w+)` \| (\w+) \| ([^|]*) \| (.*) \|$", re.MULTILINE)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> PrometheusMetrics:
    return PrometheusMetrics(registry, max_categories=2)


def test_table_of_the_documentation_has_every_metric_with_its_kind_labels_and_meaning() -> None:
    documented = {name: (kind, labels, meaning) for name, kind, labels, meaning in _ROW.findall(TABLE.read_text())}
    in_code = {
        metric.name: (
            type(metric).__name__.lower(),
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.help,
        )
        for metric in ALL
    }
    assert documented == in_code


def test_names_are_unique_and_follow_prometheus() -> None:
    names = [metric.name for metric in ALL]
    assert len(set(names)) == len(names) > 30
    for metric in ALL:
        assert re.fullmatch(r"flawstream(_[a-z]+)+", metric.name)
        assert metric.name.endswith("_total") == isinstance(metric, Counter)
        assert metric.help.endswith(".")


@pytest.mark.parametrize("metric", [one for one in ALL if isinstance(one, Histogram)], ids=lambda one: one.name)
def test_buckets_ascend_and_lie_above_0_as_ray_asks(metric: Histogram) -> None:
    assert metric.buckets
    assert metric.buckets[0] > 0
    assert list(metric.buckets) == sorted(set(metric.buckets))


@pytest.mark.parametrize("metric", ALL, ids=lambda one: one.name)
def test_every_metric_is_exported_under_its_own_name(
    metric: Metric, metrics: PrometheusMetrics, registry: CollectorRegistry
) -> None:
    labels = dict.fromkeys(metric.labels, "x")
    match metric:
        case Counter():
            metrics.add(metric, 3, **labels)
            assert collected(registry).total(metric.name, **labels) == 3
        case Gauge():
            metrics.set(metric, 3, **labels)
            assert collected(registry).total(metric.name, **labels) == 3
        case Histogram():
            metrics.observe(metric, 0.5, **labels)
            assert collected(registry).total(f"{metric.name}_count", **labels) == 1
            assert collected(registry).total(f"{metric.name}_bucket", le="+Inf", **labels) == 1


@needs_prometheus
def test_every_metric_is_as_prometheus_asks(metrics: PrometheusMetrics, registry: CollectorRegistry) -> None:
    for metric in ALL:
        labels = dict.fromkeys(metric.labels, "x")
        match metric:
            case Counter():
                metrics.add(metric, 3, **labels)
            case Gauge():
                metrics.set(metric, 3, **labels)
            case Histogram():
                metrics.observe(metric, 0.5, **labels)
    checked = promtool("check", "metrics", stdin=generate_latest(registry).decode())
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_categories_past_the_bound_count_as_other(metrics: PrometheusMetrics, registry: CollectorRegistry) -> None:
    for category in ("bottle", "cable", "tile", "wood", "bottle"):
        metrics.add(m.RESULTS, category=category, verdict="normal")
    told = collected(registry)
    assert told.total(m.RESULTS.name) == 5
    assert told.total(m.RESULTS.name, category="bottle") == 2
    assert told.total(m.RESULTS.name, category="other") == 2
    assert not list(told.matching(m.RESULTS.name, category="wood"))


def test_labels_without_a_category_are_left_as_they_are() -> None:
    labels = {"stage": "read"}
    assert CategoryLabels(most=1).bounded(labels) is labels


def test_what_is_forgotten_is_exported_no_more(metrics: PrometheusMetrics, registry: CollectorRegistry) -> None:
    for version in ("v1", "v2"):
        metrics.set(m.MODEL_INFO, 1, category="bottle", version=version)
    metrics.forget(m.MODEL_INFO, category="bottle", version="v1")
    metrics.forget(m.MODEL_INFO, category="cable", version="v1")
    assert [sample.labels["version"] for sample in collected(registry).matching(m.MODEL_INFO.name)] == ["v2"]


def test_counting_nothing_makes_no_line(metrics: PrometheusMetrics, registry: CollectorRegistry) -> None:
    metrics.add(m.RESULTS, 0, category="bottle", verdict="normal")
    assert not list(collected(registry).matching(m.RESULTS.name))


def test_counters_of_closed_sets_are_told_from_0_so_that_the_first_is_an_increase(registry: CollectorRegistry) -> None:
    PrometheusMetrics(registry, max_categories=2)
    told = collected(registry)
    assert {sample.labels["reason"]: sample.value for sample in told.matching(m.DEAD_LETTERS.name)} == dict.fromkeys(
        Reason, 0.0
    )
    assert told.most(m.MODEL_LOADS.name, outcome="failed") == 0
    assert told.most(m.ERRORS.name) == 0
    assert not list(told.matching(m.STREAM_EVENTS.name))


def test_a_gauge_that_nobody_set_is_not_told_as_0(metrics: PrometheusMetrics, registry: CollectorRegistry) -> None:
    assert not list(collected(registry).matching(m.STREAM_UP.name))
    metrics.set(m.STREAM_UP, 0)
    assert collected(registry).most(m.STREAM_UP.name) == 0
