"""The alerts: rules that Prometheus takes, each seen to fire and to keep still, each with a page on what to do."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from helpers.boards import ALERTS, RUNBOOKS, alerts
from helpers.prometheus_server import needs_prometheus, promtool

from flawstream_cli.main import load_command
from k8s.reference import VALUES
from schemas.settings import Settings

CASES = Path(__file__).parent / "alerts.yaml"
NAMES = [rule["alert"] for rule in alerts()]
SETTABLE = (Settings().model_dump(), yaml.safe_load(VALUES.read_text()))
"""What a page may tell a reader to set: our settings, and the chart's values."""
PARTS = ["What it means", "What users notice", "How to look", "What to do", "What not to do"]


@needs_prometheus
def test_rules_are_what_prometheus_takes() -> None:
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_prometheus
def test_alerts_fire_and_keep_still_as_their_cases_say() -> None:
    tested = promtool("test", "rules", CASES)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("name", NAMES)
def test_alert_has_a_case_that_fires_and_one_that_does_not(name: str) -> None:
    ends = [
        bool(case["exp_alerts"])
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == name
    ]
    assert set(ends) == {True, False}


@pytest.mark.parametrize("rule", alerts(), ids=NAMES)
def test_alert_says_how_bad_what_and_where_to_read(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{rule['alert']}.md"
    assert rule["alert"].startswith("Flawstream")


def test_each_alert_has_a_page_and_each_page_an_alert() -> None:
    assert sorted(NAMES) == sorted(page.stem for page in RUNBOOKS.glob("Flawstream*.md"))
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_page_has_what_a_person_on_call_looks_for(name: str) -> None:
    page = (RUNBOOKS / f"{name}.md").read_text()
    (rule,) = [rule for rule in alerts() if rule["alert"] == name]
    assert page.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == PARTS
    assert f"Severity: {rule['labels']['severity']}." in page


def is_there(path: list[str], tree: Any) -> bool:
    """Tell whether a tree of settings or values has a place."""
    return not path or (isinstance(tree, dict) and path[0] in tree and is_there(path[1:], tree[path[0]]))


def parse(command: Any, name: str, arguments: list[str]) -> None:
    """Have a command's own parser take a line, without running it; one that is named in passing has no arguments."""
    if isinstance(command, click.Group) and arguments:
        parse(command.commands[arguments[0]], arguments[0], arguments[1:])
    elif arguments:
        command.make_context(name, ["." if argument == "/data" else argument for argument in arguments])


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_settings_of_the_page_are_there(name: str) -> None:
    page = (RUNBOOKS / f"{name}.md").read_text()
    lines = re.findall(r"(?m)^\$ (flawstream .+)$", page) + re.findall(r"`(flawstream [^`\n]+)`", page)
    assert re.search(r"(?m)^\$ (flawstream|kubectl) ", page)
    for line in lines:
        command, *arguments = shlex.split(line)[1:]
        if not command.startswith("-"):
            parse(load_command(command), command, arguments)
    for named in re.findall(r"`([A-Za-z]+(?:\.\w+)+)`", page):
        assert named == "refused.bin" or any(is_there(named.split("."), tree) for tree in SETTABLE), named
    for link in re.findall(r"\]\(([^)#]+)", page):
        assert (RUNBOOKS / link).exists(), link
