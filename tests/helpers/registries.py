"""What tests of the registry write into one."""

import hashlib
from datetime import UTC, datetime
from typing import Any

import fsspec

from schemas.manifest import BackboneSpec, Calibration, FlowSpec, ModelManifest, TrainingRecord

FILES = {"flow.safetensors": b"weights", "notes.txt": b""}


def make_manifest(category: str = "bottle", version: str = "v1", **changes: Any) -> ModelManifest:
    values: dict[str, Any] = {
        "category": category,
        "version": version,
        "created_at": datetime(2026, 11, 23, 13, 45, tzinfo=UTC),
        "backbone": BackboneSpec(
            name="resnet18",
            weights="timm",
            weights_sha256="0" * 64,
            strides=(8, 16),
            channels=(128, 256),
            input_size=256,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        "flow": FlowSpec(steps=8, hidden_ratio=1.0, conv3x3_only=False, clamp=2.0),
        "calibration": Calibration(
            top_fraction=0.03,
            scores=(0.1, 0.30000000000000004),
            false_alarm_rate=0.05,
            threshold=0.3,
            pixel_threshold=1,
        ),
        "training": TrainingRecord(
            dataset_sha256="1" * 64,
            train_images=8,
            calibration_images=2,
            epochs=1,
            batch_size=4,
            learning_rate=1e-3,
            weight_decay=0.0,
            clip_norm=1.0,
            seed=0,
            final_loss=1.5,
            duration_s=2.0,
        ),
        "libraries": {"torch": "2.14.1"},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()},
    }
    return ModelManifest(**(values | changes))


def overwrite(root: str, path: str, data: bytes) -> None:
    fs, base = fsspec.core.url_to_fs(root)
    fs.pipe_file(f"{base}/{path}", data)
