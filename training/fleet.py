"""Training of many categories on a Ray cluster: trainers where there is room for them, jobs for trainers that run.

On a GPU a trainer takes a group of jobs, which it fits together; everywhere else a group is one job.
"""

import contextlib
import logging
import math
import time
import uuid
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from flawstream.registry.registry import Registry
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import ConfigError, DeviceLostError, RegistryError, StorageUnavailableError, one_line
from schemas.manifest import ModelManifest
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings, TrainingSettings
from training.groups import failure
from training.node_watch import NodeWatch
from training.pipeline import Progress, Stage, TrainingJob
from training.placement import Node, TrainerRequest, live_nodes, make_requests, require_node
from training.progress_metrics import record_progress
from training.trainer import Trainer

_log = logging.getLogger(__name__)

_POLL_S = 0.2
_MAX_RETRIES = 3
"""Of a job whose trainer or node was lost."""
_MAX_FAILED_STARTS = 3
_START_AGAIN_S = 5.0
_SURVEY_S = 1.0
"""Time between two looks at the cluster's nodes and free resources."""
_NO_NODE_S = 60.0
"""How long no node may be able to train, in a run that has begun: Ray takes this long to replace its view of one."""
_GET_S = 30.0
"""Longest wait for a report that has arrived; its node may have been lost meanwhile."""
_READ_BACK_S = 5.0
"""How long a network file system may take to show a new version to the driver."""
_HINT_S = 30.0


def train_fleet(
    jobs: Sequence[TrainingJob],
    model: ModelSettings,
    limits: LimitSettings,
    detector: DetectorSettings,
    training: TrainingSettings,
    *,
    metrics: Metrics = NO_METRICS,
) -> Iterator[Progress]:
    """Train all jobs, as many in parallel as the joined Ray cluster has resources for, the largest first.

    A failed job ends in `Stage.FAILED` with the error as its note; the others continue. A job whose trainer or node is
    lost is retried, up to three times, on another node if there is one, and without those that it was trained with.
    Closing the generator stops training.

    Args:
        jobs: With different names, the same backbone and the same number of threads.
        model: The backbone.
        limits: Maximum size and aspect ratio of images.
        detector: The engine that will serve, used for calibration.
        training: What Ray reserves for a trainer.
        metrics: Receives the metrics of training.

    Yields:
        The progress of all jobs; each ends in `DONE`, with a manifest that was read from the registry, or in `FAILED`.

    Raises:
        ConfigError: No node of the cluster can train, or the labels are no label selector.
    """
    if not jobs:
        return
    with NodeWatch() as watch:
        fleet = _Fleet(jobs, (model, limits, detector), training, watch)
        with contextlib.closing(fleet.train()) as progress:
            yield from record_progress(progress, metrics)


@dataclass
class _Task:
    """A job with the history of its attempts."""

    job: TrainingJob
    failures: int = 0
    avoided_nodes: set[str] = field(default_factory=set)


@dataclass
class _TrainerHandle:
    """A trainer that was asked for; it has a node once it is ready."""

    actor: Any
    request: TrainerRequest
    node: str = ""


@dataclass
class _Group:
    """Jobs that a trainer runs, by name, except those that have ended."""

    trainer: _TrainerHandle
    tasks: dict[str, _Task]


class _Fleet:
    """One run: the jobs, and the trainers for them.

    A trainer is starting (asked for, perhaps never placed), idle (ready), or running a group of jobs. Jobs are given to
    idle trainers only. While jobs wait, one trainer more than fits is asked for, so that the fleet grows with the
    cluster and an autoscaler sees the demand; when none waits, trainers that do nothing are released.
    """

    def __init__(
        self,
        jobs: Sequence[TrainingJob],
        settings: tuple[ModelSettings, LimitSettings, DetectorSettings],
        training: TrainingSettings,
        watch: NodeWatch,
    ) -> None:
        self._settings = settings
        self._training = training
        self._watch = watch
        self._waiting = [_Task(job) for job in sorted(jobs, key=_images, reverse=True)]
        self._starting: dict[Any, _TrainerHandle] = {}
        self._idle: list[_TrainerHandle] = []
        self._running: dict[Any, _Group] = {}
        self._nodes: dict[str, Node] = {}
        self._free: dict[str, float] = {}
        self._surveyed_s = self._start_after_s = 0.0
        self._node_seen_s = self._waits_since_s = time.monotonic()
        self._failed_starts = self._started = 0
        self._start_error = ""
        self._id = uuid.uuid4().hex[:6]
        self._requests: list[TrainerRequest] = []

    def train(self) -> Generator[Progress, None, None]:
        """Run all jobs."""
        self._survey()
        self._requests = make_requests(self._training, list(self._nodes.values()))
        if not self._training.wait_for_nodes:
            require_node(self._requests, list(self._nodes.values()))
        try:
            while self._waiting or self._running:
                self._survey()
                self._assign()
                self._start_trainers()
                self._release_superfluous()
                references = [*self._running, *self._starting]
                if references:
                    ray.wait(references, num_returns=1, timeout=_POLL_S)
                else:
                    time.sleep(_POLL_S)
                self._welcome()
                yield from self._collect()
                yield from self._drop_lost_nodes()
                yield from self._fail_if_nothing_can_train()
        finally:
            if ray.is_initialized():  # else they would continue training and write versions
                for trainer in self._all_trainers():
                    _kill(trainer)

    def _survey(self) -> None:
        """Look at the cluster now and then."""
        now_s = time.monotonic()
        if now_s - self._surveyed_s < _SURVEY_S:
            return
        self._surveyed_s = now_s
        self._nodes = {node.id: node for node in live_nodes()} or self._nodes
        self._free = ray.available_resources()
        used = {trainer.node for trainer in self._all_trainers()}
        self._watch.watch(node for node in self._nodes.values() if node.id in used)

    def _all_trainers(self) -> list[_TrainerHandle]:
        return [*self._starting.values(), *self._idle, *(group.trainer for group in self._running.values())]

    def _assign(self) -> None:
        """Give waiting jobs to idle trainers, a retry to one on another node than before where there is any."""
        for trainer in list(self._idle):
            elsewhere = any(other.node not in ("", trainer.node) for other in self._all_trainers())
            task = next((t for t in self._waiting if not (elsewhere and trainer.node in t.avoided_nodes)), None)
            if task is None:
                continue
            tasks = self._group_of(task, trainer.request)
            self._idle.remove(trainer)
            for one in tasks:
                self._waiting.remove(one)
                if one.job.created_at is None:
                    one.job = replace(one.job, created_at=datetime.now(UTC))
            more = f" and {len(tasks) - 1} more" if len(tasks) > 1 else ""
            run = trainer.actor.run.options(name=f"train {task.job.name}{more}")
            stream = run.remote([one.job for one in tasks])
            self._running[stream] = _Group(trainer, {one.job.name: one for one in tasks})

    def _group_of(self, task: _Task, request: TrainerRequest) -> list[_Task]:
        """Choose the waiting jobs that are trained with one, at most as many as leave enough for the other trainers.

        A job that was lost with its trainer is alone: it may be the reason.
        """
        if task.failures:
            return [task]
        fresh = [other for other in self._waiting if not other.failures]
        trainers = sum(request.count_in(node.resources) for node in self._nodes.values() if request.is_met_by(node))
        return fresh[: min(request.jobs, math.ceil(len(fresh) / max(trainers, 1)))]

    def _start_trainers(self) -> None:
        """Ask for as many trainers as fit, and one more, while jobs have none."""
        if time.monotonic() < self._start_after_s:
            return
        for request in self._requests:
            starting = sum(trainer.request == request for trainer in self._starting.values())
            missing = len(self._waiting) - len(self._idle) - starting
            fitting = request.count_in(self._free)
            for _ in range(min(missing, fitting + 1 - starting)):
                self._start(request)

    def _start(self, request: TrainerRequest) -> None:
        self._started += 1
        options = {**request.options(), "name": f"trainer {self._started} ({self._id})"}
        trainer = ray.remote(Trainer).options(**options)
        actor = trainer.remote(*self._settings, request.cpus, request.device, memory_share=request.memory_share)
        self._starting[actor.ready.remote()] = _TrainerHandle(actor, request)

    def _release_superfluous(self) -> None:
        """Release trainers without a job when none waits: their CPUs may be needed elsewhere."""
        if not self._waiting:
            for trainer in [*self._starting.values(), *self._idle]:
                _kill(trainer)
            self._starting.clear()
            self._idle.clear()

    def _welcome(self) -> None:
        """Make trainers idle that answer; drop those that could not start."""
        for reference in _arrived(self._starting):
            trainer = self._starting.pop(reference)
            try:
                trainer.node = ray.get(reference, timeout=_GET_S)
            except RayError as error:
                _kill(trainer)
                self._failed_starts += 1
                self._start_after_s = time.monotonic() + _START_AGAIN_S
                self._start_error = _cause(error)
                _log.warning("a trainer did not start: %s", self._start_error)
            else:
                self._failed_starts = 0
                self._idle.append(trainer)

    def _collect(self) -> Iterator[Progress]:
        """Pass on the reports that have arrived."""
        for stream in _arrived(self._running):
            group = self._running[stream]
            try:
                progress: Progress = ray.get(next(stream), timeout=_GET_S)
            except RayError as error:
                del self._running[stream]
                if _is_of_the_jobs(error):
                    self._idle.append(group.trainer)
                    for task in group.tasks.values():
                        yield _logged(failure(task.job, getattr(error, "cause", None), str(error)), task.job)
                else:
                    yield from self._lose(group, _cause(error))
            else:
                job = group.tasks[progress.job].job
                if progress.stage in (Stage.DONE, Stage.FAILED):
                    del group.tasks[progress.job]
                if not group.tasks:  # the stream's end is not awaited: the trainer may be lost before it
                    del self._running[stream]
                    self._idle.append(group.trainer)
                yield self._read_back(_logged(progress, job), group.trainer, job)

    def _drop_lost_nodes(self) -> Iterator[Progress]:
        """Give up the trainers of nodes that the driver no longer reaches."""
        lost = self._watch.lost()
        if not lost:
            return
        for trainer in [trainer for trainer in self._idle if trainer.node in lost]:
            self._idle.remove(trainer)
            _kill(trainer)
        for stream, group in list(self._running.items()):
            if group.trainer.node in lost:
                del self._running[stream]
                yield from self._lose(group, "the node does not answer")

    def _lose(self, group: _Group, reason: str) -> Iterator[Progress]:
        """Kill a lost trainer and retry its jobs."""
        _kill(group.trainer)
        for task in reversed(group.tasks.values()):  # each is put before those that wait
            yield self._retry(task, group.trainer, reason)

    def _retry(self, task: _Task, trainer: _TrainerHandle, reason: str) -> Progress:
        """Retry the job of a lost trainer, unless its version is there already or it was lost too often."""
        job = task.job
        task.failures += 1
        task.avoided_nodes.add(trainer.node)
        written = _written_version(job)
        if written is not None:
            return Progress(job.name, Stage.DONE, 1, 1, "", written)
        what = f"its trainer on {self._name(trainer)} was lost: {reason}"
        if task.failures > _MAX_RETRIES:
            return Progress(job.name, Stage.FAILED, 0, 1, f"{what}; so were {_MAX_RETRIES} before it")
        self._waiting.insert(0, task)
        return Progress(job.name, Stage.WAITING, 0, 1, f"retry {task.failures} of {_MAX_RETRIES}: {what}")

    def _read_back(self, progress: Progress, trainer: _TrainerHandle, job: TrainingJob) -> Progress:
        """Replace a finished job's manifest by that in the registry, which is what serving will read."""
        if progress.manifest is None:
            return progress
        manifest, deadline_s = progress.manifest, time.monotonic() + _READ_BACK_S
        while True:
            try:
                manifest = Registry(job.registry_root).manifest(manifest.category, manifest.version)
            except (RegistryError, StorageUnavailableError) as error:
                if time.monotonic() < deadline_s:
                    time.sleep(_POLL_S)
                    continue
                note = (
                    f"{manifest.model} was written on node {self._name(trainer)} and cannot be read by the driver "
                    f"({error}); registry.root={job.registry_root} must be storage that all nodes share: a network "
                    "folder mounted at the same path everywhere, or a URL such as s3://"
                )
                return Progress(progress.job, Stage.FAILED, 0, 1, note)
            return replace(progress, manifest=manifest)

    def _fail_if_nothing_can_train(self) -> Iterator[Progress]:
        """Fail the waiting jobs where no trainer starts, or where no node is left that could train."""
        now_s = time.monotonic()
        nodes = list(self._nodes.values())
        if self._running or any(request.is_met_by(node) for request in self._requests for node in nodes):
            self._node_seen_s = now_s
        if self._running or self._idle or not self._waiting:
            self._waits_since_s = now_s
            return
        reason = ""
        if self._failed_starts >= _MAX_FAILED_STARTS:
            reason = f"no trainer starts: {self._start_error}"
        elif now_s - self._node_seen_s > _NO_NODE_S and not self._training.wait_for_nodes:
            try:
                require_node(self._requests, nodes)
            except ConfigError as error:
                reason = str(error)
        if reason:
            for task in self._waiting:
                yield Progress(task.job.name, Stage.FAILED, 0, 1, reason)
            self._waiting.clear()
        elif now_s - self._waits_since_s > _HINT_S:
            self._waits_since_s = now_s
            _log.warning(
                "%d categories wait for a trainer, which needs %s; trainers that start or wait: %d; free CPUs: %g",
                len(self._waiting),
                " or ".join(request.summary for request in self._requests),
                len(self._starting),
                self._free.get("CPU", 0.0),
            )

    def _name(self, trainer: _TrainerHandle) -> str:
        node = self._nodes.get(trainer.node)
        return node.name if node is not None else trainer.node


def _kill(trainer: _TrainerHandle) -> None:
    """End a trainer at once, also one that was never placed."""
    with contextlib.suppress(RayError):  # it has ended
        ray.kill(trainer.actor)


def _images(job: TrainingJob) -> int:
    return len(job.data.train) + len(job.data.test)


def _arrived(references: Collection[Any]) -> list[Any]:
    """Return those references whose value, or next value, is there."""
    return ray.wait(list(references), num_returns=len(references), timeout=0)[0] if references else []


def _written_version(job: TrainingJob) -> ModelManifest | None:
    """Find the version that an attempt at a job wrote before it was lost."""
    registry, category = Registry(job.registry_root), job.data.name
    # where this fails, it is trained again, and reading that back will fail
    with contextlib.suppress(RegistryError, StorageUnavailableError):
        for version in reversed(registry.versions(category)):
            manifest = registry.manifest(category, version)
            if manifest.created_at == job.created_at and manifest.training.seed == job.training.seed:
                return manifest
    return None


def _is_of_the_jobs(error: RayError) -> bool:
    """Whether the trainer's code raised the error: it would do so anywhere, so that its jobs are not retried."""
    cause = getattr(error, "cause", None)
    return isinstance(error, RayTaskError) and not isinstance(cause, RayError | DeviceLostError)


def _logged(progress: Progress, job: TrainingJob) -> Progress:
    """Log a bug with its traceback, and pass the report on."""
    if progress.traceback:
        _log.error("%s: %s", job.name, progress.traceback, extra={"category": job.data.name})
    return progress


def _cause(error: RayError) -> str:
    """Describe the loss of a trainer in one line."""
    return one_line(" ".join(line for line in str(error).splitlines() if not line.startswith("\t")))
