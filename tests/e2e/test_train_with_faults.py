"""`flawstream train` as a user runs it, on data of which one category has a damaged image; then again, repaired."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.image_files import write_images

from flawstream.registry.registry import Registry


def train(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    ran = subprocess.run(  # noqa: S603 - our own interpreter
        [
            *(sys.executable, "-m", "flawstream_cli", "train", str(folder / "data"), "--registry", str(folder / "m")),
            *("--epochs", "1", "--input-size", "64", "--json", *options),
        ],
        check=False,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("FLAWSTREAM_")},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert ran.stdout, ran.stderr
    return ran.returncode, json.loads(ran.stdout), ran.stderr


def test_sound_category_is_trained_once_and_the_damaged_one_when_it_is_repaired(tmp_path: Path) -> None:
    for category in ("bottle", "cable"):
        write_images(tmp_path / "data" / category / "train" / "good", 12)
    damaged = tmp_path / "data" / "bottle" / "train" / "good" / "005.png"
    image = damaged.read_bytes()
    damaged.write_bytes(image[:100])
    code, reported, messages = train(tmp_path)
    assert code == 1, messages
    assert f"error bottle: {damaged}: " in messages
    assert messages.splitlines()[-1].startswith("bottle failed: not trained: the check of its data found errors: 1")
    assert [one["category"] for one in reported["trained"]] == ["cable"]
    assert list(reported["failed"]) == ["bottle"]
    assert str(damaged) in reported["failed"]["bottle"]
    registry = Registry(str(tmp_path / "m"))
    assert registry.categories() == ["cable"]
    cable = registry.current("cable")
    assert cable == reported["trained"][0]["version"]
    assert (reported["trained"][0]["training"]["threads"], reported["trained"][0]["training"]["device"]) == (1, "cpu")

    damaged.write_bytes(image)
    (tmp_path / "m" / "cable" / "current").unlink()  # as if the run had been cut off before the promotion
    code, reported, messages = train(tmp_path)
    assert code == 0, messages
    assert [one["category"] for one in reported["trained"]] == ["bottle"]
    assert reported["unchanged"] == [f"cable@{cable}"]
    assert registry.currents() == {"bottle": reported["trained"][0]["version"], "cable": cable}

    code, reported, messages = train(tmp_path)
    assert code == 0, messages
    assert "starting Ray" not in messages
    assert len(reported["unchanged"]) == 2
    assert f"unchanged: bottle@{registry.current('bottle')}, cable@{cable}: " in messages
    assert [len(registry.versions(category)) for category in ("bottle", "cable")] == [1, 1]

    code, reported, messages = train(tmp_path, "--again", "-c", "cable", "--no-promote")
    assert code == 0, messages
    assert reported["unchanged"] == []
    old, new = (registry.manifest("cable", version) for version in registry.versions("cable"))
    assert old.files["flow.safetensors"] == new.files["flow.safetensors"]  # the same bits
    assert old.training.model_dump(exclude={"duration_s"}) == new.training.model_dump(exclude={"duration_s"})
    assert registry.current("cable") == cable
