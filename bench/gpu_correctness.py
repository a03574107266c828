"""Whether a GPU judges as a CPU does: a version trained on solar cells, in float32 and in what `auto` chooses."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from bench.engine_versions import train_here
from flawstream.calibration import is_anomalous
from flawstream.engines.choose import make_engine
from flawstream.engines.protocol import Engine, arithmetic_of
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from schemas.manifest import ModelManifest
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings, TrainingSettings
from training.datasets.elpv import export_elpv
from training.datasets.mvtec import load_mvtec
from training.datasets.samples import Sample
from training.report.metrics import image_metrics
from training.steps.evaluate import ImageScorer

CATEGORY = "mono"


@dataclass(frozen=True, slots=True)
class _Judged:
    arithmetic: str
    scores: NDArray[np.float64]
    verdicts: NDArray[np.bool_]


def measure(folder: Path) -> dict[str, Any]:
    """Train with the default recipe, then judge all test images three ways."""
    root = str(folder / "correctness")
    (data,) = load_mvtec(export_elpv(folder / "elpv"), [CATEGORY])
    began_s = time.perf_counter()
    manifest = train_here(data, ModelSettings(), TrainingSettings(), root)
    trained_s = time.perf_counter() - began_s
    print(f"  trained on {manifest.training.train_images} images in {trained_s:.1f} s", flush=True)
    labels = np.array([sample.anomalous for sample in data.test])
    judged = {
        name: _judge(settings, manifest, Registry(root), data.test)
        for name, settings in {
            "CPU": DetectorSettings(engine="torch", device="cpu", precision="f32"),
            "GPU, f32": DetectorSettings(precision="f32"),
            "GPU, auto": DetectorSettings(),
        }.items()
    }
    found: dict[str, Any] = {"images": len(labels), "trained_s": round(trained_s, 1)}
    exact = judged["CPU"]
    for name, one in judged.items():
        row = {
            "arithmetic": one.arithmetic,
            "auroc": round(image_metrics(one.scores, labels)[0]["image_auroc"], 4),
            "flips": int((one.verdicts != exact.verdicts).sum()),
            "rank": round(float(spearmanr(one.scores, exact.scores).statistic), 5),
            "score_difference": float(np.abs(one.scores / exact.scores - 1).max()),
            "false_alarms": round(float(one.verdicts[~labels].mean()), 4),
        }
        found[name] = row
        print(f"  {name}: {row}", flush=True)
    return found


def _judge(
    settings: DetectorSettings, manifest: ModelManifest, registry: Registry, samples: tuple[Sample, ...]
) -> _Judged:
    engine: Engine = make_engine(settings, lambda: Backbone(ModelSettings()))
    arithmetic = arithmetic_of(engine, manifest)
    calibration = manifest.calibration_in(arithmetic)
    weights = registry.read_file(manifest, WEIGHTS_FILE)
    head = FastFlowHead.from_bytes(weights, manifest.backbone, manifest.flow)
    loaded = engine.load(head, manifest, partial(registry.read_file, manifest))
    scorer = ImageScorer(engine, [loaded], LimitSettings(), calibration.top_fraction, manifest.bit_depth)
    scores = np.array([image.score for (image,) in scorer.score([sample.path for sample in samples])])
    return _Judged(arithmetic, scores, is_anomalous(scores, calibration.threshold))
