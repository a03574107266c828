"""A page of documentation as a shell session: its commands one after the other in one bash, its files beside it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

SHIMS = ("curl", "docker", "git", "helm", "kubectl", "redis-cli")
"""Programs that shims.py stands in for."""
REAL = ("base64", "bash", "cat", "gzip", "openssl", "python", "sh", "sha256sum", "tar")
"""Programs that run as they are. Whatever is in neither list is not found, and fails."""

_MARK = "--ended-with--"
_BLOCK = re.compile(r"(?ms)^```console\n(.*?)^```$")
_FILE = re.compile(r"(?ms)^```yaml\n# (\S+)\n(.*?)^```$")
_IN_TEXT = re.compile(rf"`((?:{'|'.join(SHIMS)}) [^`]+)`")
_INDEX_OF_TABLE = re.compile(r"(?m)^\|.*\|$")


@dataclass(frozen=True)
class Ran:
    """A line that was run.

    Attributes:
        line: As it stands on the page.
        code: Its exit code.
        output: All that it wrote.
        calls: How programs of `SHIMS` were called by it.
    """

    line: str
    code: int
    output: str
    calls: list[list[str]] = field(default_factory=list)


def commands(text: str) -> list[str]:
    """Give every command of a page: those of its console blocks in order, then those that stand in its tables."""
    found = [line for block in _BLOCK.findall(text) for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in found), "a console block holds something else than commands"
    rows = "\n".join(_INDEX_OF_TABLE.findall(text))
    return [line.removeprefix("$ ") for line in found] + _IN_TEXT.findall(rows)


def files(text: str) -> dict[str, str]:
    """Give the files that a page shows, by the name in their first line."""
    return dict(_FILE.findall(text))


@contextmanager
def session(folder: Path, environment: Mapping[str, str]) -> Iterator["Session"]:
    """Open a shell in a folder, which finds the programs of `SHIMS` and `REAL` and no others."""
    programs = folder / "bin"
    programs.mkdir()
    for name in REAL:
        real = sys.executable if name == "python" else shutil.which(name)
        assert real, f"{name} is missing on this machine"
        (programs / name).symlink_to(real)
    for name in SHIMS:
        shim = programs / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).parent / "shims.py"}" {name} "$@"\n')
        shim.chmod(0o755)
    reading, writing = os.pipe()
    variables = {"PATH": str(programs), "PAGE_HOME": str(folder), "HOME": str(folder), **environment}
    shell = subprocess.Popen(  # noqa: S603 - what the page says
        ["bash", "--norc", "-o", "pipefail", f"/dev/fd/{reading}"],  # noqa: S607
        cwd=folder / "work",
        env=variables,
        pass_fds=[reading],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    )
    os.close(reading)
    with shell, os.fdopen(writing, "w") as script:
        yield Session(shell, script, folder / "calls.jsonl")


class Session:
    """A shell that is given one line after the other."""

    def __init__(self, shell: subprocess.Popen[str], script: IO[str], calls: Path) -> None:
        self._shell = shell
        self._script = script
        self._calls = calls
        self._calls.touch()
        self._seen = 0

    def run(self, line: str) -> Ran:
        """Run a line to its end."""
        self._script.write(f"{line}\nprintf '\\n%s %s\\n' {_MARK} $?\n")
        self._script.flush()
        output: list[str] = []
        assert self._shell.stdout is not None
        for said in self._shell.stdout:
            if said.startswith(_MARK):
                calls = [json.loads(call) for call in self._calls.read_text().splitlines()]
                new, self._seen = calls[self._seen :], len(calls)
                return Ran(line, int(said.split()[1]), "".join(output), new)
            output.append(said)
        raise AssertionError(f"the shell ended at: {line}\n{''.join(output)}")
