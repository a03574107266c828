"""The command line run in the test's own process, as `main` is called by the script, or in one of its own."""

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from flawstream_cli.main import main


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def make_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Give a function that runs a command line, its arguments made text; a traceback on its way out is a failure."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["flawstream", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return Ran(code, said.out, said.err)

    return run


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what tests and Ray have set for themselves.

    `RAY_AUTH_MODE` stays: where a test before this one has started Ray in this process, it is `token`, and clusters
    that this process starts ask every program for the token.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name == "RAY_AUTH_MODE" or not name.startswith(("FLAWSTREAM_", "RAY_"))
    }
