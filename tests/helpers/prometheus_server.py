"""A real Prometheus: where its programs are, and a server on a port of its own."""

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.places import ROOT
from helpers.waiting import wait_until
from workers.redis.embedded import free_port

_FETCHED = ROOT / ".prometheus" / "usr" / "bin"

Sample = tuple[Mapping[str, str], float]


def program(name: str) -> str | None:
    """Find a program: as `make prometheus` fetched it, or on the PATH."""
    return shutil.which(name, path=str(_FETCHED)) or shutil.which(name)


needs_prometheus = pytest.mark.skipif(
    program("prometheus") is None or program("promtool") is None,
    reason="no Prometheus: `make prometheus` fetches it where there is apt-get; else put it on the PATH",
)


def promtool(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool, with a text on its standard input."""
    found = program("promtool")
    assert found is not None
    return subprocess.run([found, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=False)  # noqa: S603 - Prometheus's own


class PrometheusServer:
    """A server that scrapes every second, and forgets all when it is closed.

    Args:
        folder: Where its data and its configuration go.
        jobs: `scrape_configs` as Prometheus has them.
        rules: Files of rules.
    """

    def __init__(self, folder: Path, jobs: Sequence[Mapping[str, Any]], rules: Sequence[Path]) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        config = folder / "prometheus.yml"
        config.write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(path) for path in rules],
                    "scrape_configs": [dict(job) for job in jobs],
                }
            )
        )
        found = program("prometheus")
        assert found is not None
        self._log = (folder / "prometheus.log").open("w")
        self._process = subprocess.Popen(  # noqa: S603 - Prometheus's own
            [
                found,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        wait_until(lambda: self._process.poll() is not None or self._ready(), "Prometheus is ready")
        assert self._process.poll() is None, Path(self._log.name).read_text()

    def close(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def query(self, expr: str) -> list[Sample]:
        """Ask for what is now.

        Raises:
            urllib.error.HTTPError: The expression is none.
        """
        found = self._ask("query", query=expr)
        if found["resultType"] == "scalar":
            return [({}, float(found["result"][1]))]
        return [(one["metric"], float(one["value"][1])) for one in found["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """Give all alerting rules with their health and what they fire."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def label_values(self, label: str, metric: str) -> list[str]:
        """Give what a board's variable would offer."""
        found: list[str] = self._ask(f"label/{label}/values", **{"match[]": metric})
        return found

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready"):  # noqa: S310 - of the test's own server
                return True
        except OSError:
            return False

    def _ask(self, path: str, **parameters: str) -> Any:
        asked = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(asked) as answer:  # noqa: S310 - of the test's own server
            return json.load(answer)["data"]
