"""`flawstream profile` on real services: the stages of an image are there, and they add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fakes import png
from helpers.tiny_models import write_version

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.settings import Settings

pytestmark = pytest.mark.timeout(300)

IMAGES = 48
STAGES = {"read", "decode", "handle", "wait", "detect", "encode", "publish"}


def profiled(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flawstream_cli", "profile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours


def test_profile_attributes_the_time_of_an_image_in_both_layouts(tmp_path: Path) -> None:
    root = tmp_path / "models"
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    for category in ("bottle", "cable"):
        write_version(Registry(str(root)), category, spec=spec)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    (photographs / "good.png").write_bytes(png())
    (photographs / "broken.png").write_bytes(b"no image at all")
    ran = profiled(photographs, "--registry", root, "--images", IMAGES, "--engine", "torch", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert [one["layout"] for one in found] == ["worker", "serve"]
    for one in found:
        assert one["images"] == IMAGES
        assert one["dead_letters"] == IMAGES // 2
        assert set(one["ms_per_image"]) == STAGES
        assert 0 < one["engine_busy"] <= 1
        assert one["engine_busy"] == pytest.approx(one["ms_per_image"]["detect"] * one["images_per_s"] / 1000, rel=0.02)
    in_worker, behind_handle = (one["ms_per_image"]["handle"] for one in found)
    assert 0 <= in_worker < behind_handle


def test_registry_without_versions_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    ran = profiled(tmp_path, "--registry", tmp_path / "none")
    assert ran.returncode == 3
    assert "has no model versions; train some with `flawstream train`" in ran.stderr


def test_profile_ends_where_a_category_cannot_be_judged(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "models"))
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    write_version(registry, "bottle", spec=spec)
    write_version(registry, "cable", spec=spec, weights=b"no safetensors")
    (tmp_path / "one.png").write_bytes(png())
    ran = profiled(tmp_path / "one.png", "--registry", registry.root, "--layout", "worker", "--engine", "torch")
    assert ran.returncode == 3
    assert "images of a category cannot be judged; `flawstream doctor` gives the reason" in ran.stderr
