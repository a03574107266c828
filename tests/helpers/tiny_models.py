"""Model versions small enough for any test, and an engine that needs no network: the score is the grey level."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from flawstream.calibration import calibrate
from flawstream.engines.protocol import HeadRows, Read, ScoredBatch, no_files, score_batch, weights_bytes
from flawstream.fastflow.head import FastFlowHead
from flawstream.imaging.pixels import Pixels
from flawstream.registry.registry import Registry
from schemas.manifest import Arithmetic, BackboneSpec, FlowSpec, ModelManifest, TrainingRecord
from schemas.settings import BitDepth

SPEC = BackboneSpec(
    name="tiny",
    weights="none",
    weights_sha256="0" * 64,
    strides=(16, 32),
    channels=(2, 4),
    input_size=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
CALIBRATION_SCORES = tuple((np.arange(19) + 1) / 10)
"""0.1 to 1.9; at a false alarm rate of 0.05 the threshold is the highest."""
FALSE_ALARM_RATE = 0.05
NOT_A_NUMBER, INFINITE, TOO_LARGE = 253, 254, 255
"""Grey levels for which the engine gives a grid that is NaN, infinite, or past what float16 holds."""

FLOW = FlowSpec(steps=1, hidden_ratio=0.5, conv3x3_only=False, clamp=2.0)


def make_manifest(
    category: str = "bottle",
    version: str = "v1",
    *,
    spec: BackboneSpec = SPEC,
    flow: FlowSpec = FLOW,
    files: Mapping[str, bytes] = MappingProxyType({}),
    age: timedelta = timedelta(),
    scores: Sequence[float] = CALIBRATION_SCORES,
    bit_depth: BitDepth = 16,
) -> ModelManifest:
    """Describe a version that nobody trained."""
    levels = np.array(scores)
    return ModelManifest(
        category=category,
        version=version,
        created_at=datetime(2026, 1, 1, tzinfo=UTC) - age,
        backbone=spec,
        flow=flow,
        bit_depth=bit_depth,
        calibration=calibrate(levels, levels, FALSE_ALARM_RATE, top_fraction=0.0),
        training=TrainingRecord(
            dataset_sha256="0" * 64,
            train_images=1,
            calibration_images=len(levels),
            epochs=1,
            batch_size=1,
            learning_rate=1.0,
            weight_decay=0.0,
            clip_norm=1.0,
            seed=0,
            final_loss=0.0,
            duration_s=0.0,
        ),
        libraries={},
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )


def write_version(
    registry: Registry,
    category: str,
    version: str = "v1",
    *,
    spec: BackboneSpec = SPEC,
    flow: FlowSpec = FLOW,
    weights: bytes | None = None,
    promote: bool = True,
    age: timedelta = timedelta(),
    scores: Sequence[float] = CALIBRATION_SCORES,
    bit_depth: BitDepth = 16,
) -> ModelManifest:
    """Publish a version with random weights, or with the bytes given for weights."""
    data = FastFlowHead(spec, flow).to_bytes() if weights is None else weights
    files = {"flow.safetensors": data}
    manifest = make_manifest(
        category, version, spec=spec, flow=flow, files=files, age=age, scores=scores, bit_depth=bit_depth
    )
    registry.write(manifest, files)
    if promote:
        registry.promote(category, version)
    return manifest


def image(level: int, side: int = SPEC.input_size) -> NDArray[np.uint8]:
    """Make an image of one grey level, (S, S, 3)."""
    return np.full((side, side, 3), level, np.uint8)


class TinyEngine:
    """An `Engine` whose grids are the image's grey level over 100, and something worse for three levels.

    Args:
        spec: What the engine says that its backbone is.
        factor: Of the grids; large as of a flow that exploded.
    """

    precision: Arithmetic = "float32"
    trial_arithmetic: Arithmetic | None = None
    concurrent_batches = 1
    usable = True

    def __init__(self, spec: BackboneSpec = SPEC, factor: float = 1.0) -> None:
        self.spec = spec
        self.factor = factor
        self.batches: list[int] = []
        self.loads = 0

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> str:
        del read
        assert not head.training
        self.loads += 1
        return manifest.model if manifest is not None else "not published"

    def memory_of(self, head: FastFlowHead) -> int:
        return weights_bytes(head)

    def warm_up(self) -> None:
        pass

    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        assert sorted(np.concatenate([head.rows for head in heads])) == list(range(len(images)))
        self.batches.append(len(images))
        greys = images.mean(axis=(1, 2, 3), dtype=np.float64)
        levels = greys / 100 * self.factor
        for grey, value in ((NOT_A_NUMBER, np.nan), (INFINITE, np.inf), (TOO_LARGE, 1e6)):
            levels[greys == grey] = value
        grids = [
            np.broadcast_to(levels[:, None, None], (len(images), side, side)).astype(np.float32)
            for side in self.spec.grid_sizes
        ]
        return score_batch(grids, heads)
