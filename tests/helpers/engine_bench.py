"""Heads, images and comparisons for tests of engines."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from flawstream.engines.protocol import Engine, HeadRows, Loaded
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.imaging.maps import published_grid
from flawstream.imaging.pixels import Pixels
from helpers.tiny_models import make_manifest
from schemas.manifest import ArithmeticTrial, Calibration, FlowSpec

Images = NDArray[np.uint8]
Grids = list[NDArray[np.float32]]

SIZE = 64
TOP_FRACTION = 0.1
FLOW = FlowSpec(steps=2, hidden_ratio=0.5, conv3x3_only=False, clamp=2.0)


def make_head(reference: Backbone, seed: int) -> FastFlowHead:
    """A head whose every tensor is away from where it starts."""
    head = FastFlowHead(reference.spec, FLOW, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.2 * (1 + seed))
    return head.eval()


def kept_trial(calibration: Calibration, arithmetic: Literal["int8", "float16"]) -> ArithmeticTrial:
    return ArithmeticTrial(
        arithmetic=arithmetic,
        scope="flows",
        kept=True,
        normal_images=8,
        rank_correlation=1,
        alarms=0,
        alarms_float32=0,
        calibration=calibration,
    )


def make_images(count: int, seed: int = 0) -> Images:
    """Textures of different brightness."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, SIZE // 8, SIZE // 8, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def assert_same(grids: Grids, expected: Grids, tolerance: float = 1e-3) -> None:
    assert len(grids) == len(expected)
    for grid, other in zip(grids, expected, strict=True):
        assert grid.dtype in (np.float32, np.float16)
        wanted = other if grid.dtype == np.float32 else published_grid(other).astype(np.float32)  # clipped
        np.testing.assert_allclose(grid, wanted, rtol=tolerance, atol=tolerance * float(np.abs(wanted).max()))


def load(engine: Engine, head: FastFlowHead, category: int, version: str = "v1") -> Loaded:
    return engine.load(head, make_manifest(f"category-{category}", version, spec=engine.spec, flow=FLOW))


def judge(engine: Engine, version: Loaded, images: Pixels) -> Grids:
    """Judge images of one category."""
    return mixed(engine, images, [(version, np.arange(len(images)))])


def mixed(engine: Engine, images: Pixels, heads: Sequence[tuple[Loaded, NDArray[np.int64]]]) -> Grids:
    """Judge images of several categories."""
    scored = engine.detect(images, [HeadRows(version, rows, TOP_FRACTION) for version, rows in heads])
    return [np.asarray(grid) for grid in scored.grids]
