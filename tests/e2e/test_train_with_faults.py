"""`flawstream train` as a user runs it, on a data set of which one category has a damaged image."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.image_files import write_images

from flawstream.registry.registry import Registry


def test_sound_category_is_trained_and_the_damaged_one_is_reported_as_failed(tmp_path: Path) -> None:
    for category in ("bottle", "cable"):
        write_images(tmp_path / "data" / category / "train" / "good", 12)
    damaged = tmp_path / "data" / "bottle" / "train" / "good" / "005.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    ran = subprocess.run(  # noqa: S603 - our own interpreter
        [
            *(
                sys.executable,
                "-m",
                "flawstream_cli",
                "train",
                str(tmp_path / "data"),
                "--registry",
                str(tmp_path / "m"),
            ),
            *("--epochs", "1", "--input-size", "64", "--json"),
        ],
        check=False,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("FLAWSTREAM_")},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert ran.returncode == 1, ran.stderr
    assert f"error bottle: {damaged}: " in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("bottle failed: not trained: the check of its data found errors: 1")
    reported = json.loads(ran.stdout)
    assert [one["category"] for one in reported["trained"]] == ["cable"]
    assert list(reported["failed"]) == ["bottle"]
    assert str(damaged) in reported["failed"]["bottle"]
    registry = Registry(str(tmp_path / "m"))
    assert registry.categories() == ["cable"]
    assert registry.current("cable") == reported["trained"][0]["version"]
