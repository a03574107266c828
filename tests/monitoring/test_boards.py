"""The boards: made by the code that is there, readable, and asking for nothing that is not measured."""

import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
from helpers.boards import Asked, alerts, boards, filled_in, panels, parts, queries, vector_selectors

from flawstream.telemetry.metrics import ALL, Histogram
from k8s.boards.__main__ import FOLDER, make
from schemas.settings import Settings
from training.pipeline import Stage
from workers.observe.drift import QUANTILES

OURS = {metric.name: metric for metric in ALL}
OF_OTHERS = {
    "ALERTS": {"alertname", "alertstate"},  # Prometheus's own
    "process_start_time_seconds": set(),  # prometheus-client's
    "ray_serve_deployment_replica_healthy": {"deployment"},
    "ray_serve_replica_startup_latency_ms_count": {"deployment"},
}
"""Metrics that are not ours, with the labels that we know of them."""
OF_SCRAPES = {"namespace", "job", "instance"}
"""Labels that Prometheus adds."""
NOT_SHOWN = dict.fromkeys(
    (name for name in OURS if name.startswith("flawstream_capture_")),
    "of `flawstream capture` alone, which runs beside a camera, outside the installation that a board shows",
)
"""Metrics that are on no board, and why."""
QUERIES = queries()


def selectors(expr: str) -> Iterator[tuple[set[str], dict[str, tuple[str, str]]]]:
    """Give what an expression selects: the metrics, and how each label must be."""
    for node in vector_selectors(expr):
        matchers = {one.name: (str(one.op).rpartition(".")[2], one.value) for one in node.matchers.matchers}
        _, pattern = matchers.pop("__name__", ("", ""))
        known = {each for each in _told() if pattern and re.fullmatch(pattern, each)}
        yield ({node.name} if node.name else known), matchers


def _told() -> Iterator[str]:
    for name, metric in OURS.items():
        yield from (
            (f"{name}_{part}" for part in ("bucket", "sum", "count")) if isinstance(metric, Histogram) else (name,)
        )


def labels_of(name: str) -> tuple[set[str], dict[str, tuple[str, ...]]]:
    """Give the labels of a line, and the values of those that are closed sets."""
    if name in OF_OTHERS:
        return OF_OTHERS[name], {}
    if name in OURS and not isinstance(OURS[name], Histogram):
        return set(OURS[name].labels), dict(OURS[name].values)
    whole, _, part = name.rpartition("_")
    metric = OURS[whole]
    assert isinstance(metric, Histogram), name
    assert part in {"bucket", "sum", "count"}, name
    closed = dict(metric.values)
    if part == "bucket":
        closed["le"] = (*map(str, metric.buckets), "+Inf")
    return {*metric.labels, *(["le"] if part == "bucket" else [])}, closed


@pytest.mark.parametrize("name", boards())
def test_board_is_what_the_code_makes(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == make(name), "run: make boards"


@pytest.mark.parametrize("asked", QUERIES, ids=[asked.where for asked in QUERIES])
def test_query_asks_for_metrics_and_labels_that_there_are(asked: Asked) -> None:
    found = list(selectors(asked.expr))
    assert found
    for names, matchers in found:
        assert names, asked.expr
        for name in names:
            labels, closed = labels_of(name)
            assert matchers.keys() <= labels | OF_SCRAPES, name
            for label, (op, value) in matchers.items():
                values = closed.get(label)
                if values is not None and op in {"Equal", "NotEqual"}:
                    assert value in values, f"{name}: {label} is never {value}"
                elif values is not None:
                    assert any(re.fullmatch(value, each) for each in values), f"{name}: {label} is never {value}"


@pytest.mark.parametrize("asked", QUERIES, ids=[asked.where for asked in QUERIES])
def test_query_groups_by_labels_that_there_are(asked: Asked) -> None:
    every: set[str] = set()
    for names, _ in selectors(asked.expr):
        every |= set().union(*(labels_of(name)[0] for name in names))
    for node in parts(promql_parser.parse(filled_in(asked.expr))):
        modifier = getattr(node, "modifier", None)
        grouped = (
            getattr(modifier, "labels", None) or getattr(getattr(modifier, "matching", None), "labels", None) or []
        )
        assert set(grouped) <= every | OF_SCRAPES, asked.expr


def test_every_metric_is_on_a_board_or_left_out_for_a_reason() -> None:
    shown = set()
    for _, panel in panels():
        for target in panel["targets"]:
            for names, _ in selectors(target["expr"]):
                shown |= {re.sub("_(bucket|sum|count)$", "", name) for name in names}
    assert (OURS.keys() - shown) == NOT_SHOWN.keys()


def test_gauges_that_every_worker_tells_alike_are_never_summed() -> None:
    alike = re.compile(r"sum[^(]*\(\s*(rate\(|increase\()?flawstream_(stream|backlog|pending|lag|oldest)_")
    assert [asked.where for asked in QUERIES if alike.search(asked.expr)] == []


@pytest.mark.parametrize(("board", "panel"), list(panels()), ids=[f"{b}: {p['title']} {p['id']}" for b, p in panels()])
def test_panel_tells_its_reader_what_it_is_and_what_to_do(board: str, panel: dict[str, Any]) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"], board
    assert len(panel["description"]) > 40
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        assert target["legendFormat"]
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), "the legend names a label that is summed away"
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    named = re.findall(r"Alert: (\w+)", panel["description"])
    assert [link["url"] for link in panel.get("links", [])] == [f"docs/runbooks/{name}.md" for name in named]
    assert set(named) <= {rule["alert"] for rule in alerts()}


@pytest.mark.parametrize("name", boards())
def test_board_fits_the_grid_and_chooses_its_source(name: str) -> None:
    board = boards()[name]
    assert board["uid"] == f"flawstream-{name}"
    assert board["templating"]["list"][0]["type"] == "datasource"
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies on another"
        taken |= cells


def test_settings_that_are_named_to_the_reader_are_settings() -> None:
    sections = {name: set(field.annotation.model_fields) for name, field in Settings.model_fields.items()}  # type: ignore[union-attr]
    for _, panel in panels():
        for section, field in re.findall(r"`([a-z]+)\.([a-z_]+)`", panel["description"]):
            assert field in sections[section], f"{section}.{field}"


def test_sets_of_values_are_those_of_the_code_that_counts() -> None:
    assert OURS["flawstream_window_score"].values["share"] == tuple(str(share) for share in QUANTILES)
    stages = {stage.value for stage in Stage}
    ends = set(OURS["flawstream_training_jobs_total"].values["outcome"])
    assert ends == {"done", "failed"} <= stages
    assert set(OURS["flawstream_training_images_total"].values["stage"]) <= stages - ends


def test_the_boards_line_of_drift_is_the_alerts() -> None:
    name = "flawstream_drift_distance"
    (rule,) = [rule for rule in alerts() if rule["alert"] == "FlawstreamDrift"]
    limits = {
        step["value"]
        for _, panel in panels()
        if any(name in target["expr"] for target in panel["targets"])
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        if step.get("value") is not None
    }
    assert limits == {float(re.findall(rf"{name} > ([\d.]+)", rule["expr"])[0])}
