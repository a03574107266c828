"""Metrics of training, recorded from its progress. Knows no Ray."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import Metrics
from training.pipeline import Progress, Stage


def record_progress(reports: Iterable[Progress], metrics: Metrics) -> Iterator[Progress]:
    """Record progress and pass it on.

    Args:
        reports: Progress of any number of jobs.
        metrics: Receives the metrics; the label `category` is the job's name.

    Yields:
        The reports, unchanged.
    """
    counted: dict[tuple[str, Stage], int] = defaultdict(int)
    for progress in reports:
        name, stage = progress.job, progress.stage
        if stage in (Stage.DONE, Stage.FAILED):
            metrics.add(m.TRAINING_JOBS, outcome=stage.value)
            metrics.forget(m.TRAINING_EPOCH, category=name)
        elif stage is not Stage.INT8:  # does not count images
            done = progress.done - counted[name, stage]
            counted[name, stage] = progress.done
            metrics.add(m.TRAINING_IMAGES, done, category=name, stage=stage.value)
        if stage is Stage.TRAINING:
            metrics.set(m.TRAINING_EPOCH, progress.epoch, category=name)
            metrics.set(m.TRAINING_LOSS, progress.loss, category=name)
        yield progress
