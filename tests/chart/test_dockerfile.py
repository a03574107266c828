"""The Dockerfile: what a linter says, and whether it fits the chart and what `make test-image` runs without Docker."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from helpers.chart.rendered import CHART
from helpers.places import ROOT

DOCKER = ROOT / "k8s" / "docker"
TEXT = (DOCKER / "Dockerfile").read_text()
WHOLE = TEXT.replace("\\\n", " ")


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    ran = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)  # noqa: S603 - as installed
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_base_is_pinned_by_tag_and_digest() -> None:
    assert re.search(r"(?m)^ARG BASE=python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", TEXT)
    stages = set(re.findall(r"(?m)^FROM \S+ AS (\S+)$", TEXT))
    assert set(re.findall(r"(?m)^FROM (\S+)", TEXT)) - stages == {"${BASE}"}


def test_user_and_version_are_the_chart_s() -> None:
    user = yaml.safe_load((CHART / "values.yaml").read_text())["podSecurity"]["runAsUser"]
    assert f"USER {user}:{user}" in TEXT
    assert f"--uid {user} " in (DOCKER / "account.sh").read_text()
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ARG VERSION={project['version']}\n" in TEXT
    assert chart["appVersion"] == project["version"]


def test_extras_are_ours_and_none_is_for_development() -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"(?m)^ARG EXTRAS=(\S+)$", TEXT):
        assert set(extras.split(",")) == set(ours) - {"demo", "dev"}


def test_whatever_is_run_is_run_without_docker_as_well() -> None:
    proof = (ROOT / "tests" / "chart" / "build_image_root.sh").read_text()
    commands = re.findall(r"(?m)^RUN (?:--mount=\S+\s+)*(.+)$", WHOLE)
    assert commands
    for command in commands:
        script = re.match(r"bash (?:\S+/)?(install\.sh (?:packages|project)|account\.sh)", command)
        assert script, command
        assert script[1] in proof


def test_what_is_copied_is_there_and_is_let_through() -> None:
    let_through = re.findall(r"(?m)^!(\S+)$", (DOCKER / "Dockerfile.dockerignore").read_text())
    for path in let_through:
        assert (ROOT / path).exists(), path
    for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", WHOLE):
        for source in line.split()[:-1]:
            assert source == "." or source in let_through, source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= set(let_through)
