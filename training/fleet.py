"""Every category over the cluster: a pool of Ray actors, each with the backbone loaded once, working off the jobs."""

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
from training.pipeline import Job, Progress, Stage, run_job
from training.progress_metrics import recorded
from training.steps.features import FeatureExtractor

_log = logging.getLogger(__name__)

_POLL_S = 0.2
_REPORT_S = 0.2
"""A stage reports no more often than this, its end excepted: a report costs some milliseconds of Ray's time."""


class Trainer:
    """What an actor runs: jobs one after the other on one backbone.

    Args:
        model: Which backbone.
        limits: What is too large to be decoded.
        detector: Which engine will serve: it sets the thresholds.
        threads: CPU threads of this actor.
    """

    def __init__(self, model: ModelSettings, limits: LimitSettings, detector: DetectorSettings, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model, self._limits, self._detector, self._threads = model, limits, detector, threads
        self._opened: tuple[FeatureExtractor, Engine] | None = None

    def run(self, job: Job) -> Iterator[Progress]:
        """Work off one job, yielding its progress.

        Raises:
            FlawstreamError: What `run_job` raises, and what is wrong with the backbone: a constructor's error would
                reach the caller as the text of a dead actor.
        """
        if self._opened is None:
            backbone = Backbone(self._model)
            engine = make_local_engine(self._detector, lambda: backbone, self._threads)
            self._opened = FeatureExtractor(backbone, self._limits, self._threads), engine
        stage, said_at_s = None, 0.0
        for progress in run_job(job, *self._opened):
            now_s = time.monotonic()
            if progress.stage is not stage or progress.done == progress.total or now_s - said_at_s >= _REPORT_S:
                stage, said_at_s = progress.stage, now_s
                yield progress


def train_fleet(
    jobs: Sequence[Job],
    model: ModelSettings,
    limits: LimitSettings,
    detector: DetectorSettings,
    *,
    num_gpus: float = 0.0,
    metrics: Metrics = NO_METRICS,
) -> Iterator[Progress]:
    """Train all jobs in parallel on the Ray cluster joined, as many at a time as fit on it.

    A job that fails ends in `Stage.FAILED` with what was wrong as its note; the others go on. Whoever stops consuming
    stops the training.

    Args:
        jobs: Of different names, all of one backbone.
        model: Which backbone.
        limits: What is too large to be decoded.
        detector: Which engine will serve: it sets the thresholds.
        num_gpus: GPUs, or a share of one, for each job; 0 takes a whole one where the cluster has any.
        metrics: Where numbers go.

    Yields:
        The progress of all jobs as it comes, each job ending in `DONE` or `FAILED`.
    """
    with contextlib.closing(_train(jobs, model, limits, detector, num_gpus=num_gpus)) as training:
        yield from recorded(training, metrics)


def _train(
    jobs: Sequence[Job],
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
    running: dict[Any, tuple[Any, Job]] = {}

    def start(actor: Any = None) -> None:
        if waiting:
            actor = actor or remote.remote(model, limits, detector, threads)
            job = waiting.popleft()
            running[actor.run.remote(job)] = (actor, job)

    try:
        for _ in range(actors):
            start()
        while running:
            ray.wait(list(running), num_returns=1, timeout=_POLL_S)  # until one of them has something to say
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
                ray.kill(actor)  # else it would train on, and write versions that nobody waits for


def share_cluster(nodes: Sequence[Mapping[str, float]], jobs: int, gpus: float) -> tuple[int, int]:
    """Choose how many actors to run and how many CPUs each has, so that every one of them fits on some node.

    Args:
        nodes: The resources of each, `CPU` and `GPU`.
        jobs: Jobs to run.
        gpus: GPUs, or a share of one, of an actor.
    """

    def places(threads: int) -> int:
        return sum(
            min(int(node.get("CPU", 0)) // threads, math.floor(node.get("GPU", 0) / gpus + 1e-6) if gpus else jobs)
            for node in nodes
        )

    actors = min(jobs, places(1))
    if actors == 0 < jobs:
        _log.warning("no node has a CPU and %g GPUs for training; it starts as soon as one joins the cluster", gpus)
        return 1, 1
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    return actors, max((threads for threads in range(1, most + 1) if places(threads) >= actors), default=1)


def _explain(job: Job, error: RayError) -> str:
    """Say in one line what the terminal shows; what is a bug of ours is logged with its traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, FlawstreamError):
        return str(cause)
    _log.error("%s: %s", job.name, error, extra={"category": job.data.name})
    if isinstance(error, RayTaskError):
        return f"{type(cause).__name__}: {_one_line(str(cause))}"
    details = [line for line in str(error).splitlines() if not line.startswith("\t")]
    return f"its training process is gone. {_one_line(' '.join(details))}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
