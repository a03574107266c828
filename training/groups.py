"""The training of several categories by one trainer: each on its own, except for the fit, which they share. No Ray."""

import errno
import gc
import itertools
import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing

import torch

from flawstream.engines.device import open_device
from flawstream.engines.protocol import Engine
from schemas.errors import ConfigError, DeviceLostError, FlawstreamError, one_line
from training.pipeline import PendingFit, Progress, Stage, TrainingJob
from training.remote_data import run_on_copy
from training.steps.features import FeatureExtractor
from training.steps.fit import fit_heads
from training.steps.stack_size import free_bytes, stack_sizes

_log = logging.getLogger(__name__)


def run_group(
    jobs: Sequence[TrainingJob], extractor: FeatureExtractor, engine: Engine, *, memory_share: float = 1.0
) -> Iterator[Progress]:
    """Run jobs, one after another, except that the fits are carried out together.

    Args:
        jobs: With different names and the same backbone.
        extractor: The backbone, shared by the jobs of a process.
        engine: The engine that will serve.
        memory_share: Share of the GPU's memory that this process may use.

    Yields:
        The progress of all jobs; each ends in `DONE`, or in `FAILED`, which changes no other.

    Raises:
        DeviceLostError: The GPU failed; this process cannot use it any more.
    """
    with ExitStack() as stack:
        runs = [_Run(job, extractor, engine, shares_disk=len(jobs) > 1) for job in jobs]
        for run in runs:
            stack.enter_context(closing(run))
            yield from run.advance()
        yield from _fit([run for run in runs if run.pending], memory_share)
        for run in runs:
            yield from run.advance()
    for run in runs:
        if run.needs_disk:  # which is free now
            yield from run_group([run.job], extractor, engine, memory_share=memory_share)


class _Run:
    """A job on its way.

    Attributes:
        job: The job.
        pending: The fit that it waits for.
        error: That of its fit.
        needs_disk: It ended for lack of space on the disk, which the features of others take.
    """

    def __init__(self, job: TrainingJob, extractor: FeatureExtractor, engine: Engine, *, shares_disk: bool) -> None:
        self.job = job
        self.pending: PendingFit | None = None
        self.error: Exception | None = None
        self.needs_disk = False
        self._shares_disk = shares_disk
        self._steps = run_on_copy(job, extractor, engine)

    def advance(self) -> Iterator[Progress]:
        """Continue to the fit, or to the end.

        Raises:
            DeviceLostError: The GPU failed.
        """
        self.pending = None
        try:
            if self.error is not None:
                self._steps.throw(self.error)
            for step in self._steps:
                if isinstance(step, PendingFit):
                    self.pending = step
                    return
                yield step
        except DeviceLostError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of a job, whose error is no other's
            self.needs_disk = self._shares_disk and _is_full_disk(error)
            if not self.needs_disk:
                yield failure(self.job, error, traceback.format_exc())

    def close(self) -> None:
        """Remove what the job has on the disk."""
        self._steps.close()


def failure(job: TrainingJob, error: BaseException | None, trace: str) -> Progress:
    """Describe a job's error in one line; a bug's with its traceback for the log."""
    if isinstance(error, FlawstreamError):
        return Progress(job.name, Stage.FAILED, 0, 1, str(error))
    note = f"{type(error).__name__}: {one_line(error)}"
    return Progress(job.name, Stage.FAILED, 0, 1, note, traceback=trace)


def _is_full_disk(error: Exception) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ENOSPC


def _fit(runs: Sequence[_Run], memory_share: float) -> Iterator[Progress]:
    """Fit the heads of all runs, in stacks for which there is memory."""
    device = open_device()
    sizes = stack_sizes([run.pending.fit for run in runs if run.pending], free_bytes(device, memory_share))
    for start, end in itertools.pairwise([0, *itertools.accumulate(sizes)]):
        yield from _fit_stack(runs[start:end], device)


def _fit_stack(runs: Sequence[_Run], device: torch.device) -> Iterator[Progress]:
    """Fit the heads of some runs together; after an error, of memory or of one of them, each half is tried alone."""
    pending = [run.pending for run in runs if run.pending]
    try:
        for number, step in fit_heads([one.fit for one in pending], device):
            if step.images > pending[number].images:  # not those of the attempt that failed
                yield pending[number].report(step)
    except DeviceLostError:
        raise
    except Exception as error:  # noqa: BLE001 - of one category, if it is none of memory
        if len(runs) == 1:
            runs[0].error = _no_memory(runs[0].job, error) if isinstance(error, MemoryError) else error
            return
        _log.warning("%d categories cannot train together, now half as many: %s", len(runs), one_line(error))
    else:
        return
    gc.collect()  # the error is gone, with the frames that kept the memory of the stack
    half = len(runs) // 2
    yield from _fit_stack(runs[:half], device)
    yield from _fit_stack(runs[half:], device)


def _no_memory(job: TrainingJob, error: MemoryError) -> ConfigError:
    return ConfigError(
        f"the GPU has no memory to train on {len(job.data.train)} images ({error}); train on fewer images, with a "
        "smaller model.input_size or training.batch_size, or on another GPU"
    )
