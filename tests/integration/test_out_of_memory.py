"""Real engines in a process whose address space is bounded: what is too large a batch is judged in parts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import write_version

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.settings import Settings

IMAGES = 512
ROOM_BYTES = 700_000_000  # threads and compiled kernels want some, whatever the batch
JUDGE = """
import asyncio, json, resource, sys
from pathlib import Path
import numpy as np
from schemas.settings import DetectorSettings, Settings
from serving.detector import make_detector

async def main(engine, root, images, room):
    settings = DetectorSettings(engine=engine, max_batch_images=images)
    detector = make_detector(root, Settings().model, settings)
    await detector.start()
    side = (await detector.pixel_forms(["bottle"]))[0].side_px
    pixels = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), np.uint8)
    alone = [await detector.detect(pixels[row : row + 1], ["bottle"]) for row in (0, images - 1)]
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
    together = await detector.detect(pixels, ["bottle"] * images)
    print(json.dumps({
        "alone": [outcome.score for (outcome,) in alone],
        "together": [outcome.score for outcome in together],
        "halvings": detector.status()["halvings"],
    }))
    await detector.stop()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


needs_bounds = pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds an address space this way")


def judge_in_little_room(engine: str, root: Path) -> int:
    """Have the batch judged, see that it went as each image alone, and give how often it was halved."""
    if engine != "torch":
        pytest.importorskip(engine)
    write_version(Registry(str(root)), "bottle", spec=Backbone(Settings().model).spec)
    ran = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", JUDGE, engine, str(root), str(IMAGES), str(ROOM_BYTES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert len(told["together"]) == IMAGES
    assert [told["together"][0], told["together"][-1]] == pytest.approx(told["alone"], rel=1e-3)
    return int(told["halvings"])


@needs_bounds
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_batch_for_which_there_is_no_memory_is_judged_in_parts(engine: str, tmp_path: Path) -> None:
    assert judge_in_little_room(engine, tmp_path) > 0


@needs_bounds
def test_ncnn_judges_image_by_image_and_has_memory_for_any_batch(tmp_path: Path) -> None:
    assert judge_in_little_room("ncnn", tmp_path) == 0
