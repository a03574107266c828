"""One run of ours for `bench.accuracy`, in a process of its own: `python -m bench.accuracy_ours JOB RESULT`."""

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from flawstream.engines.choose import make_local_engine
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings, TrainingSettings
from training.datasets.samples import CategoryData, Sample
from training.pipeline import Stage, TrainingJob, run_job
from training.steps.evaluate import ImageScorer
from training.steps.features import FeatureExtractor


def main(job_file: str, result_file: str) -> None:
    """Train with the default recipe, then score every test image with the version that was published."""
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    started = time.monotonic()
    samples = tuple(
        Sample(Path(path), anomalous=anomalous, defect="defective" if anomalous else "good", mask=None)
        for path, anomalous in zip(job["test"], job["anomalous"], strict=True)
    )
    data = CategoryData(job["set_name"], tuple(map(Path, job["train"])), samples)
    recipe = TrainingSettings(epochs=job["epochs"], seed=job["seed"])
    backbone = Backbone(ModelSettings())
    extractor = FeatureExtractor(backbone, LimitSettings(), job["threads"])
    engine = make_local_engine(DetectorSettings(), lambda: backbone, job["threads"])
    epoch = ""
    with tempfile.TemporaryDirectory() as root:
        for progress in run_job(TrainingJob(data, ModelSettings(), recipe, root), extractor, engine):
            if progress.stage is Stage.TRAINING and progress.note.split("  ")[0] != epoch:
                epoch = progress.note.split("  ")[0]
                print(progress.note, file=sys.stderr, flush=True)
        assert progress.manifest is not None  # noqa: S101 - a job ends with it or raises
        manifest = progress.manifest
        seconds = time.monotonic() - started
        read = partial(Registry(root).read_file, manifest)
        head = FastFlowHead.from_bytes(read(WEIGHTS_FILE), manifest.backbone, manifest.flow)
        loaded = engine.load(head, manifest, read)
    scorer = ImageScorer(engine, [loaded], extractor.limits, manifest.calibration.top_fraction, manifest.bit_depth)
    scores = [image.score for (image,) in scorer.score([sample.path for sample in samples])]
    result = {"scores": scores, "false_alarm_rate": manifest.serving_metrics.false_alarm_rate, "seconds": seconds}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
