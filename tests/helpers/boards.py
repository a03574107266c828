"""What boards and alerts ask: the queries in the files that are installed, as they are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser
import yaml

from helpers.places import ROOT

FILES = ROOT / "k8s" / "flawstream" / "files"
ALERTS = FILES / "alerts.yaml"
RUNBOOKS = ROOT / "docs" / "runbooks"


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


def filled_in(expr: str, category: str = "bottle") -> str:
    """Put values in the place of Grafana's variables, as Grafana does: of what may be all, all; of the rest, one."""
    values = {"$__rate_interval": "1m", "$namespace": ".*", '=~"$category"': '=~".*"', "$category": category}
    for name, value in values.items():
        expr = expr.replace(name, value)
    return expr


def parts(node: Any) -> Iterator[Any]:
    """Give a parsed expression and all in it."""
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        below = getattr(node, name, None)
        if below is not None and not isinstance(below, str):
            yield from parts(below)
    for below in getattr(node, "args", None) or []:
        yield from parts(below)


def vector_selectors(expr: str) -> Iterator[promql_parser.VectorSelector]:
    """Give what an expression selects."""
    for node in parts(promql_parser.parse(filled_in(expr))):
        if isinstance(node, promql_parser.VectorSelector):
            yield node
