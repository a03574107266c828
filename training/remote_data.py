"""Training on images by URL: each category is copied to the trainer's machine, checked there and trained. Knows no Ray.

Every file is read once from the storage, though training reads it several times.
"""

from collections.abc import Generator
from dataclasses import replace

from flawstream.engines.protocol import Engine
from schemas.errors import DatasetError
from training.datasets.check import Severity, check_content, exclusion_reason
from training.datasets.decoding import decode_files
from training.datasets.local_copy import LocalCopy
from training.datasets.samples import CategoryData
from training.pipeline import PendingFit, Progress, Stage, TrainingJob, run_stages
from training.steps.features import FeatureExtractor


def run_on_copy(
    job: TrainingJob, extractor: FeatureExtractor, engine: Engine
) -> Generator[Progress | PendingFit, None, None]:
    """Run a job; if its images are URLs, on copies of them, after the check that local ones pass before training.

    Args:
        job: The training job.
        extractor: The backbone, shared by the jobs of a process.
        engine: The engine that will serve.

    Yields:
        As `run_stages`.

    Raises:
        DatasetError: The storage fails, or the data has errors; or as `run_stages`.
        ConfigError: The disk for temporary files is full; or as `run_stages`.
    """
    with LocalCopy(job.data) as copy:
        files, copied = len(job.data.files()), 0
        for copied in copy.fill():
            yield Progress(job.name, Stage.DOWNLOADING, copied, files)
        data = copy.data
        try:
            if copied:
                _check(data, extractor)
            yield from run_stages(replace(job, data=data), extractor, engine)
        except DatasetError as error:
            raise DatasetError(copy.with_urls(str(error))) from error


def _check(data: CategoryData, extractor: FeatureExtractor) -> None:
    findings = check_content(data, decode_files(data, extractor.form, extractor.limits), extractor.limits)
    if errors := [finding for finding in findings if finding.severity is Severity.ERROR]:
        raise DatasetError(exclusion_reason(errors))
