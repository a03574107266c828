"""Joining a cluster that is not there, and starting one that does not come."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flawstream_cli import cluster
from schemas.errors import ConfigError


def test_address_where_nobody_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever tests before this one have started
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}"):
            cluster.connect(address)


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "https://head"])
def test_addresses_of_other_protocols_are_refused_with_what_to_use_instead(address: str) -> None:
    with pytest.raises(ConfigError, match=f"^{address} .*--submit http"):
        cluster.connect(address)


def test_start_that_takes_too_long_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray does

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", start)
    with pytest.raises(ConfigError, match=r"did not start .*timed out.*; the machine is busy"):
        cluster.connect()


def test_other_errors_of_ray_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", start)
    with pytest.raises(RuntimeError, match="something else"):
        cluster.connect()


def test_folder_in_which_ray_cannot_start_is_named_with_the_cure(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    program = "from flawstream_cli import cluster; cluster.connect()"
    ran = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", program],
        env=os.environ | {"TMPDIR": str(folder)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert "ConfigError: Ray did not start on this machine: " in ran.stderr
    assert f"its files go to {folder}/ray" in ran.stderr
    assert "None" not in ran.stderr.splitlines()[-1]
