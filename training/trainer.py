"""The Ray actor that trains: it loads the backbone once, and runs groups of jobs one after another."""

import os
import time
from collections.abc import Iterator, Sequence

import ray
import torch

from flawstream.engines.choose import make_local_engine
from flawstream.engines.protocol import Engine
from flawstream.fastflow.backbone import Backbone
from schemas.manifest import Device
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings
from training.groups import run_group
from training.pipeline import Progress, Stage, TrainingJob
from training.steps.features import FeatureExtractor

_REPORT_S = 0.2
"""Minimum time between reports of a stage, except its last: a report takes Ray some milliseconds."""


class Trainer:
    """A Ray actor that runs training jobs on one backbone.

    Args:
        model: The backbone.
        limits: Maximum size and aspect ratio of images.
        detector: The engine that will serve, used for calibration.
        threads: CPU threads of this actor.
        device: Kind of device that it trains on.
        memory_share: Share of a GPU's memory that it may use.
    """

    def __init__(
        self,
        model: ModelSettings,
        limits: LimitSettings,
        detector: DetectorSettings,
        threads: int,
        device: Device,
        *,
        memory_share: float,
    ) -> None:
        if device == "cpu":  # Ray does not hide a node's GPUs from an actor that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(threads)
        self._model, self._limits, self._detector, self._threads = model, limits, detector, threads
        self._memory_share = memory_share
        self._opened: tuple[FeatureExtractor, Engine] | None = None

    def ready(self) -> str:
        """Return the id of the node on which the actor runs: the answer says that it runs."""
        return str(ray.get_runtime_context().get_node_id())

    def run(self, jobs: Sequence[TrainingJob]) -> Iterator[Progress]:
        """Run some jobs and yield their progress; each ends in `DONE` or `FAILED`.

        Loads the backbone at the first call: the caller would see an exception of the constructor as a dead actor.

        Raises:
            FlawstreamError: The backbone cannot be loaded.
            DeviceLostError: The GPU failed; this actor cannot use it any more.
        """
        if self._opened is None:
            backbone = Backbone(self._model)
            engine = make_local_engine(self._detector, lambda: backbone, self._threads)
            self._opened = FeatureExtractor(backbone, self._limits, self._threads), engine
        reported: dict[str, tuple[Stage, float]] = {}
        for progress in run_group(jobs, *self._opened, memory_share=self._memory_share):
            now_s = time.monotonic()
            stage, reported_at_s = reported.get(progress.job, (None, 0.0))
            if progress.stage is not stage or progress.done == progress.total or now_s - reported_at_s >= _REPORT_S:
                reported[progress.job] = progress.stage, now_s
                yield progress
