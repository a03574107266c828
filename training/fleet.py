"""Every category over the cluster: a pool of Ray actors, each with the backbone loaded once, working off the jobs."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from flawstream.cluster import Cluster
from flawstream.fastflow.backbone import Backbone
from schemas.errors import FlawstreamError
from schemas.settings import LimitSettings, ModelSettings
from training.features import FeatureExtractor
from training.job import Job, Progress, Stage, run_job

_POLL_S = 0.2


class Trainer:
    """What an actor runs: jobs one after the other on one backbone.

    Args:
        model: Which backbone.
        limits: What is too large to be decoded.
        threads: CPU threads of this actor.
    """

    def __init__(self, model: ModelSettings, limits: LimitSettings, threads: int) -> None:
        torch.set_num_threads(threads)
        self._extractor = FeatureExtractor(Backbone(model), limits, threads)

    def run(self, job: Job) -> Iterator[Progress]:
        """Work off one job, yielding its progress."""
        yield from run_job(job, self._extractor)


def train_fleet(
    jobs: Sequence[Job], model: ModelSettings, limits: LimitSettings, cluster: Cluster, num_gpus: float
) -> Iterator[Progress]:
    """Train all jobs in parallel, as many at a time as the cluster has room for.

    A job that fails ends in `Stage.FAILED` with what was wrong as its note; the others go on.

    Args:
        jobs: One a category, all of one backbone.
        model: Which backbone.
        limits: What is too large to be decoded.
        cluster: Where to train; `flawstream.cluster.connect` gives it.
        num_gpus: GPUs, or a share of one, for each category; 0 takes a whole one where the cluster has any.

    Yields:
        The progress of all jobs as it comes, each job ending in `DONE` or `FAILED`.
    """
    gpus = num_gpus or (1.0 if cluster.gpus else 0.0)
    slots = cluster.gpus / gpus if gpus else cluster.cpus
    actors = max(1, min(len(jobs), int(slots)))
    threads = max(1, int(cluster.cpus) // actors)
    remote = ray.remote(Trainer).options(num_cpus=threads, num_gpus=gpus)
    waiting = deque(jobs)
    running: dict[Any, tuple[Any, Job]] = {}

    def start(actor: Any) -> None:
        if waiting:
            job = waiting.popleft()
            running[actor.run.remote(job)] = (actor, job)

    for _ in range(actors):
        start(remote.remote(model, limits, threads))
    while running:
        ready, _ = ray.wait(list(running), num_returns=len(running), timeout=_POLL_S)
        for stream in ready:
            actor, job = running[stream]
            try:
                yield ray.get(next(stream))
            except StopIteration:
                del running[stream]
                start(actor)
            except (RayTaskError, RayActorError) as error:
                del running[stream]
                yield Progress(job.data.name, Stage.FAILED, 0, 1, _explain(error))
                start(remote.remote(model, limits, threads) if isinstance(error, RayActorError) else actor)


def _explain(error: RayTaskError | RayActorError) -> str:
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, FlawstreamError) else str(error)
