"""Hundreds of hot swaps while images are judged: none fails, and none is judged by parts of two versions."""

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_models import FLOW, write_version
from helpers.waiting import Deadline

from flawstream.engines.torch_engine import TorchEngine
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.score import image_scores
from flawstream.registry.registry import Registry
from schemas.settings import DetectorSettings, ModelSettings
from serving.detector import DetectorService
from workers.ports import Detection

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]  # hundreds of swaps: minutes on a busy machine

SWAPS = 300
VERSIONS = ("v0", "v1", "v2", "v3")
SIDE = 32
CALLERS = 3
IMAGE = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    path = tmp_path / "resnet18.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    return Backbone(ModelSettings(backbone="resnet18", weights=str(path), strides=(8, 16), input_size=SIDE))


def publish(registry: Registry, backbone: Backbone, version: str, number: int) -> tuple[float, float]:
    """Write a version that no other looks like; gives the score of the image by it, and its threshold."""
    head = FastFlowHead(backbone.spec, FLOW, seed=number)
    with torch.no_grad():
        for statistics in head.statistics:
            statistics.mean.add_(3.0 * number)  # type: ignore[operator]  # a tensor
        grids = FoldedHead(head.eval())(backbone(torch.from_numpy(IMAGE)))
    levels = tuple(number + (np.arange(19) + 1) / 100)
    manifest = write_version(
        registry, "bottle", version, spec=backbone.spec, weights=head.to_bytes(), promote=False, scores=levels
    )
    return float(image_scores(grids, 0.0)[0]), manifest.calibration.threshold


async def test_hundreds_of_swaps_under_load_fail_no_image_and_mix_no_versions(
    tmp_path: Path, backbone: Backbone
) -> None:
    registry = Registry(str(tmp_path / "models"))
    expected = {f"bottle@{name}": publish(registry, backbone, name, k) for k, name in enumerate(VERSIONS)}
    assert len({round(score, 1) for score, _ in expected.values()}) == len(VERSIONS)
    registry.promote("bottle", VERSIONS[0])
    service = DetectorService(registry, TorchEngine(backbone), DetectorSettings(refresh_s=0.001))
    await service.start()
    seen: Counter[str] = Counter()
    swapped = asyncio.Event()

    async def judge_for_ever() -> None:
        count = 1
        while not swapped.is_set():
            count = count % 4 + 1
            for outcome in await service.detect(IMAGE.repeat(count, axis=0), ["bottle"] * count):
                assert isinstance(outcome, Detection), outcome
                score, threshold = expected[outcome.model]
                assert outcome.score == pytest.approx(score, rel=1e-3)
                assert outcome.threshold == threshold
                seen[outcome.model] += 1

    async def swap() -> None:
        for number in range(1, SWAPS + 1):
            name = f"bottle@{VERSIONS[number % len(VERSIONS)]}"
            registry.promote("bottle", VERSIONS[number % len(VERSIONS)])
            model = ""
            deadline = Deadline(f"{name} is judged with")
            while model != name:
                deadline.check()
                (outcome,) = await service.detect(IMAGE, ["bottle"])
                assert isinstance(outcome, Detection), outcome
                model = outcome.model
        swapped.set()

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(swap())
            for _ in range(CALLERS):
                tasks.create_task(judge_for_ever())
    finally:
        await service.stop()
    assert set(seen) == set(expected)
    assert seen.total() > SWAPS
