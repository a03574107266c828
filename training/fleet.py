"""Training of many categories on a Ray cluster: a pool of actors that load the backbone once and run jobs."""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from flawstream.engines.choose import make_local_engine
from flawstream.engines.protocol import Engine
from flawstream.fastflow.backbone import Backbone
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import FlawstreamError
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings
from training.pipeline import Progress, Stage, TrainingJob
from training.progress_metrics import record_progress
from training.remote_data import run_on_copy
from training.steps.features import FeatureExtractor

_log = logging.getLogger(__name__)

_POLL_S = 0.2
_REPORT_S = 0.2
"""Minimum time between reports of a stage, except its last: a report takes Ray some milliseconds."""


class Trainer:
    """A Ray actor that runs training jobs one after another on one backbone.

    Args:
        model: The backbone.
        limits: Maximum size and aspect ratio of images.
        detector: The engine that will serve, used for calibration.
        threads: CPU threads of this actor.
    """

    def __init__(self, model: ModelSettings, limits: LimitSettings, detector: DetectorSettings, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model, self._limits, self._detector, self._threads = model, limits, detector, threads
        self._opened: tuple[FeatureExtractor, Engine] | None = None

    def run(self, job: TrainingJob) -> Iterator[Progress]:
        """Run one job and yield its progress.

        Loads the backbone at the first call: the caller would see an exception of the constructor as a dead actor.

        Raises:
            FlawstreamError: The backbone cannot be loaded; or as `run_on_copy`.
        """
        if self._opened is None:
            backbone = Backbone(self._model)
            engine = make_local_engine(self._detector, lambda: backbone, self._threads)
            self._opened = FeatureExtractor(backbone, self._limits, self._threads), engine
        stage, reported_at_s = None, 0.0
        for progress in run_on_copy(job, *self._opened):
            now_s = time.monotonic()
            if progress.stage is not stage or progress.done == progress.total or now_s - reported_at_s >= _REPORT_S:
                stage, reported_at_s = progress.stage, now_s
                yield progress


def train_fleet(
    jobs: Sequence[TrainingJob],
    model: ModelSettings,
    limits: LimitSettings,
    detector: DetectorSettings,
    *,
    num_gpus: float = 0.0,
    metrics: Metrics = NO_METRICS,
) -> Iterator[Progress]:
    """Train all jobs, as many in parallel as the joined Ray cluster has resources for.

    A failed job ends in `Stage.FAILED` with the error as its note; the others continue. Closing the generator stops
    training.

    Args:
        jobs: With different names and the same backbone.
        model: The backbone.
        limits: Maximum size and aspect ratio of images.
        detector: The engine that will serve, used for calibration.
        num_gpus: GPUs, or a fraction of one, per actor; 0: one GPU if the cluster has any.
        metrics: Receives the metrics of training.

    Yields:
        The progress of all jobs; each ends in `DONE` or `FAILED`.
    """
    with contextlib.closing(_train(jobs, model, limits, detector, num_gpus=num_gpus)) as training:
        yield from record_progress(training, metrics)


def _train(
    jobs: Sequence[TrainingJob],
    model: ModelSettings,
    limits: LimitSettings,
    detector: DetectorSettings,
    *,
    num_gpus: float,
) -> Generator[Progress, None, None]:
    gpus = num_gpus or (1.0 if ray.cluster_resources().get("GPU") else 0.0)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    actors, threads = share_cluster(nodes, len(jobs), gpus)
    remote = ray.remote(Trainer).options(num_cpus=threads, num_gpus=gpus)
    waiting = deque(jobs)
    running: dict[Any, tuple[Any, TrainingJob]] = {}

    def start(actor: Any = None) -> None:
        if waiting:
            actor = actor or remote.remote(model, limits, detector, threads)
            job = waiting.popleft()
            running[actor.run.remote(job)] = (actor, job)

    try:
        for _ in range(actors):
            start()
        while running:
            ray.wait(list(running), num_returns=1, timeout=_POLL_S)  # until one has a report
            for stream in ray.wait(list(running), num_returns=len(running), timeout=0)[0]:
                actor, job = running[stream]
                try:
                    yield ray.get(next(stream))
                except StopIteration:
                    del running[stream]
                    start(actor)
                except RayError as error:
                    del running[stream]
                    start(actor if isinstance(error, RayTaskError) else None)
                    yield Progress(job.name, Stage.FAILED, 0, 1, _explain(job, error))
    finally:
        if ray.is_initialized():
            for actor, _ in running.values():
                ray.kill(actor)  # else it would continue training and write versions


def share_cluster(nodes: Sequence[Mapping[str, float]], jobs: int, gpus: float) -> tuple[int, int]:
    """Choose the number of actors and the CPUs of each, so that every actor fits on a node.

    Args:
        nodes: Resources of each node, `CPU` and `GPU`.
        jobs: Number of jobs.
        gpus: GPUs, or a fraction of one, of an actor.

    Returns:
        The number of actors, and the CPUs of each.
    """

    def max_actors(threads: int) -> int:
        return sum(
            min(int(node.get("CPU", 0)) // threads, math.floor(node.get("GPU", 0) / gpus + 1e-6) if gpus else jobs)
            for node in nodes
        )

    actors = min(jobs, max_actors(1))
    if actors == 0 < jobs:
        _log.warning(
            "no node has a CPU and %g GPUs for training; training starts when such a node joins the cluster", gpus
        )
        return 1, 1
    max_threads = int(max((node.get("CPU", 0) for node in nodes), default=1))
    return actors, max((threads for threads in range(1, max_threads + 1) if max_actors(threads) >= actors), default=1)


def _explain(job: TrainingJob, error: RayError) -> str:
    """Describe an error in one line for the terminal; log bugs with their traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, FlawstreamError):
        return str(cause)
    _log.error("%s: %s", job.name, error, extra={"category": job.data.name})
    if isinstance(error, RayTaskError):
        return f"{type(cause).__name__}: {_one_line(str(cause))}"
    details = [line for line in str(error).splitlines() if not line.startswith("\t")]
    return f"its training process died: {_one_line(' '.join(details))}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
