"""What the chart makes of the alerts and boards: the files as they are, with links to where runbooks are published."""

import json
from typing import Any

import pytest
import yaml
from helpers.boards import ALERTS, FILES, RUNBOOKS
from helpers.chart.rendered import render

ALL: dict[str, Any] = {"monitor": "PodMonitor", "rules": True, "dashboards": True}


def made(kind: str, **values: Any) -> list[dict[str, Any]]:
    return [document for document in render({"monitoring": {**ALL, **values}}) if document["kind"] == kind]


def test_rule_and_boards_are_the_files() -> None:
    (rule,) = made("PrometheusRule")
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())
    boards = {name: text for each in made("ConfigMap") for name, text in each["data"].items() if name.endswith(".json")}
    assert boards == {path.name: path.read_text() for path in (FILES / "dashboards").glob("*.json")}
    assert len(boards) == 3


@pytest.mark.parametrize("published", ["https://wiki.plant/flawstream", "https://wiki.plant/flawstream/"])
def test_alerts_and_panels_link_to_where_runbooks_are_published(published: str) -> None:
    (rule,) = made("PrometheusRule", runbookUrl=published)
    links = {alert["annotations"]["runbook_url"] for group in rule["spec"]["groups"] for alert in group["rules"]}
    assert links == {f"https://wiki.plant/flawstream/{page.name}" for page in RUNBOOKS.glob("Flawstream*.md")}
    for each in made("ConfigMap", runbookUrl=published):
        for name, text in each["data"].items():
            if name.endswith(".json"):
                for panel in json.loads(text)["panels"]:
                    assert {link["url"] for link in panel.get("links", [])} <= links


def test_nothing_is_made_for_operators_that_may_not_be_there_unless_asked() -> None:
    kinds = {document["kind"] for document in render({})}
    assert not kinds & {"PodMonitor", "ServiceMonitor", "PrometheusRule"}


def test_boards_are_what_grafanas_sidecar_finds() -> None:
    boards = [each for each in made("ConfigMap") if any(name.endswith(".json") for name in each["data"])]
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in boards)
