"""Metrics of training, recorded from its progress. Knows no Ray."""

import time
from collections.abc import Callable, Iterable, Iterator

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import Metrics
from training.pipeline import Progress, Stage

_OF_THE_FIT = (m.TRAINING_EPOCH, m.TRAINING_SPEED, m.TRAINING_LEFT)


class Pace:
    """Speed of a stage, measured from its first report on.

    Args:
        first: The first report.
        now_s: Its time.
    """

    def __init__(self, first: Progress, now_s: float) -> None:
        self._first, self._start_s = first, now_s

    def images_per_s(self, progress: Progress, now_s: float) -> float | None:
        """Return the mean speed up to a report of the same stage; None until there is one."""
        seconds, images = now_s - self._start_s, progress.done - self._first.done
        return images / seconds if seconds > 0 and images > 0 else None


def record_progress(
    reports: Iterable[Progress], metrics: Metrics, now: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """Record progress and pass it on.

    Args:
        reports: Progress of any number of jobs.
        metrics: Receives the metrics; the label `category` is the job's name.
        now: A clock, s.

    Yields:
        The reports, unchanged.
    """
    latest: dict[str, Progress] = {}
    paces: dict[str, Pace] = {}
    for progress in reports:
        name, stage = progress.job, progress.stage
        before = latest.pop(name, None)
        if stage in (Stage.DONE, Stage.FAILED, Stage.WAITING):
            if stage is not Stage.WAITING:
                metrics.add(m.TRAINING_JOBS, outcome=stage.value)
            for gauge in _OF_THE_FIT:
                metrics.forget(gauge, category=name)
        else:
            latest[name] = progress
            same_stage = before is not None and before.stage is stage
            if stage not in (Stage.INT8, Stage.DOWNLOADING):  # the first counts none, the second files
                done = progress.done - (before.done if before is not None and same_stage else 0)
                metrics.add(m.TRAINING_IMAGES, done, category=name, stage=stage.value)
        if stage is Stage.TRAINING:
            if before is None or before.stage is not stage:
                paces[name] = Pace(progress, now())
            metrics.set(m.TRAINING_EPOCH, progress.epoch, category=name)
            metrics.set(m.TRAINING_LOSS, progress.loss, category=name)
            speed = paces[name].images_per_s(progress, now())
            if speed is not None:
                metrics.set(m.TRAINING_SPEED, speed, category=name)
                metrics.set(m.TRAINING_LEFT, (progress.total - progress.done) / speed, category=name)
        yield progress
