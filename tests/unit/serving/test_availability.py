"""A start waits for the registry, and says for what."""

import logging
from pathlib import Path

import pytest
from helpers.tiny_models import write_version

import serving.availability
from flawstream.registry.registry import Registry
from serving.availability import LOG_S, wait_for_versions


class Clock:
    """Time that passes only in `sleep`.

    Args:
        registry: Gets its first version after a minute and a half.
    """

    def __init__(self, registry: Registry) -> None:
        self.now_s = 0.0
        self.sleeps: list[float] = []
        self._registry = registry

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.sleeps.append(duration_s)
        if self.now_s > 3 * LOG_S and not self._registry.currents():
            write_version(self._registry, "bottle")


@pytest.mark.parametrize("root", ["empty", "absent"])
def test_start_waits_for_a_current_version_and_logs_for_what_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, root: str
) -> None:
    folder = tmp_path / "models"
    if root == "empty":
        folder.mkdir()
    registry = Registry(str(folder))
    clock = Clock(registry)
    monkeypatch.setattr(serving.availability, "time", clock)
    with caplog.at_level(logging.INFO):
        wait_for_versions(registry)
    assert 3 * LOG_S < clock.now_s < 3 * LOG_S + 10
    assert max(clock.sleeps) > 10 * min(clock.sleeps)  # it backs off
    assert 3 <= len(caplog.records) <= 4
    assert {str(folder) in record.getMessage() for record in caplog.records} == {True}
    assert "not mounted" in caplog.records[0].getMessage()
