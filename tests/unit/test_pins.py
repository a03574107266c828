"""Everything that is installed is pinned, with hashes that pip is asked to check."""

import re
import tomllib

import pytest
from helpers.places import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = {
    "constraints.txt": [
        *PROJECT["dependencies"],
        *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
    ],
    "bench/peers/constraints.txt": (ROOT / "bench/peers/requirements.in").read_text().splitlines(),
    "tests/fuzzing/constraints.txt": (ROOT / "tests/fuzzing/requirements.in").read_text().splitlines(),
    "tests/triton/constraints.txt": (ROOT / "tests/triton/requirements.in").read_text().splitlines(),
}
"""What each file pins the whole tree of."""


def entries(constraints: str) -> list[str]:
    """Return the entries of a file, one line each: ``name==version ; marker --hash=sha256:...``."""
    lines = (ROOT / constraints).read_text().replace("\\\n", " ").splitlines()
    return [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("constraints", WANTED)
def test_each_version_is_pinned_with_hashes(constraints: str) -> None:
    for entry in entries(constraints):
        assert re.match(r"[\w.-]+==\S+ ( ?; .+?)? +--hash=sha256:[0-9a-f]{64}\b", entry), entry


@pytest.mark.parametrize("constraints", WANTED)
def test_pins_are_of_what_is_wanted(constraints: str) -> None:
    pins = [Requirement(entry.split("--hash")[0]) for entry in entries(constraints)]
    versions = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }
    wanted = [Requirement(line.split("#")[0]) for line in WANTED[constraints] if not line.startswith("#")]
    for requirement in wanted:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_each_installation_checks_hashes() -> None:
    commands = [
        line
        for script in ("Makefile", "k8s/docker/install.sh")
        for line in (ROOT / script).read_text().splitlines()
        if re.search(r"\bpip install |\$\(PIP_INSTALL\)", line) and not line.startswith("PIP_INSTALL")
    ]
    unchecked = [line.strip() for line in commands if "--require-hashes" not in line]
    assert unchecked == [
        "@$(BIN) $(PIP_INSTALL) --editable .",  # our own sources; PIP_INSTALL has the two options below
        'pip install --no-deps --index-url "$torch_index" "${torch[@]}"',  # an index whose hashes are not ours to have
        "pip install --no-deps --no-build-isolation .",
    ]
