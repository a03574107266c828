"""What boards and alerts ask: the queries in the files that are installed, as they are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FILES = Path(__file__).parents[1] / "k8s" / "flawstream" / "files"
ALERTS = FILES / "alerts.yaml"
RUNBOOKS = Path(__file__).parents[1] / "docs" / "runbooks"


class Asked(NamedTuple):
    """A query, and who asks it."""

    where: str
    expr: str


def board(path: Path) -> dict[str, Any]:
    """Read a board."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def boards() -> dict[str, dict[str, Any]]:
    """Read all boards, by name."""
    return {path.stem: board(path) for path in sorted((FILES / "dashboards").glob("*.json"))}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Give every panel with the name of its board; rows are none."""
    for name, whole in boards().items():
        for panel in whole["panels"]:
            if panel["type"] != "row":
                yield name, panel


def alerts() -> list[dict[str, Any]]:
    """Read all alerting rules."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def queries() -> list[Asked]:
    """Give every query of every board and alert."""
    of_boards = [
        Asked(f"{name}: {panel['title']}: {target['legendFormat']}", target["expr"])
        for name, panel in panels()
        for target in panel["targets"]
    ]
    return of_boards + [Asked(f"alert: {rule['alert']}", rule["expr"]) for rule in alerts()]


def filled_in(expr: str, *, category: str = ".*", window: str = "1m") -> str:
    """Put values in the place of Grafana's variables, as Grafana does."""
    for name, value in (("$__rate_interval", window), ("$namespace", ".*"), ("$category", category)):
        expr = expr.replace(name, value)
    return expr
