"""Counts and times what a stream worker does, for its stats and for metrics. Knows no loop and no server."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from flawstream.telemetry.traces import NO_TRACER, Span, Tracer
from schemas.errors import ModelUnavailableError, Reason
from schemas.messages import DeadLetter, DetectionResult
from workers.observe import log_fields
from workers.observe.drift import DriftMonitor
from workers.ports import Completion

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class WorkerStats:
    """What a worker has done since it started.

    Attributes:
        read: Entries delivered to it, redelivered ones included.
        batches: Batches started.
        results: Images completed with a result.
        dead: Images completed with a dead letter, by reason.
        not_ours: Outcomes not written because another worker owned the entry, or an earlier try had completed it.
        retries: Retries after transient errors of the detector or the server.
        deferred: Deferrals of images whose category has no usable version.
        orphans: Entries that were delivered, not completed, and no longer pending for anybody: delivered again.
        errors: Bugs: unexpected exceptions. Their entries stay pending.
    """

    read: int = 0
    batches: int = 0
    results: int = 0
    dead: Counter[Reason] = field(default_factory=Counter)
    not_ours: int = 0
    retries: int = 0
    deferred: int = 0
    orphans: int = 0
    errors: int = 0

    @property
    def completed(self) -> int:
        """Return how many images were completed, with a result or a dead letter."""
        return self.results + self.dead.total()

    def as_dict(self) -> dict[str, object]:
        """Return the counts, ready for JSON."""
        return asdict(self) | {"dead": {str(reason): count for reason, count in self.dead.items()}}


class Batch:
    """A batch in flight, and the stages it went through.

    Attributes:
        began_ns: Its start, nanoseconds since 1970.
        stages: The stages so far.
    """

    def __init__(self, tally: "Tally") -> None:
        self.began_ns = time.time_ns()
        self.stages: list[Span] = []
        self._tally = tally

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, retries included; one that fails is not recorded."""
        began_ns, began_s = time.time_ns(), time.perf_counter()
        yield
        took_s = time.perf_counter() - began_s
        self.stages.append(Span(name, began_ns, began_ns + round(took_s * 1e9)))
        self._tally.timed(name, took_s)


class Tally:
    """Counts and times what a worker does.

    Args:
        metrics: Receives counts and times.
        drift: Receives every result; absent: drift is not measured.
        tracer: Receives the spans of every image.
    """

    def __init__(
        self, metrics: Metrics = NO_METRICS, drift: DriftMonitor | None = None, tracer: Tracer = NO_TRACER
    ) -> None:
        self.stats = WorkerStats()
        self._metrics = metrics
        self._drift = drift
        self._tracer = tracer

    def start_batch(self, images: int, queued_s: float) -> "Batch":
        """Count a batch and its images.

        Args:
            images: How many it has.
            queued_s: How long its oldest image was queued.
        """
        self.stats.batches += 1
        self.stats.read += images
        self._metrics.add(m.IMAGES, images)
        self._metrics.observe(m.BATCH_IMAGES, images, stage="read")
        self.timed("queue", queued_s)
        return Batch(self)

    def timed(self, stage: str, duration_s: float) -> None:
        """Record the time of a batch in a stage."""
        self._metrics.observe(m.STAGE_SECONDS, duration_s, stage=stage)

    def completed(self, batch: "Batch", completions: Sequence[Completion], ours: Sequence[bool]) -> None:
        """Count, log and trace the outcomes of a batch.

        Args:
            batch: From `start_batch`.
            completions: Its completions.
            ours: For each, whether it was written.
        """
        results: Counter[tuple[str, str]] = Counter()
        dead: Counter[Reason] = Counter()
        for completion, written in zip(completions, ours, strict=True):
            match completion.outcome:
                case DetectionResult() as result if written:
                    results[result.category, result.verdict.value] += 1
                    self._metrics.observe(m.IMAGE_SECONDS, result.total_ms / 1000)
                    if self._drift is not None:
                        self._drift.add(result)
                case DeadLetter(reason=reason) if written:
                    dead[reason] += 1
        for (category, verdict), count in results.items():
            self._metrics.add(m.RESULTS, count, category=category, verdict=verdict)
        for reason, count in dead.items():
            self._metrics.add(m.DEAD_LETTERS, count, reason=reason.value)
        self._log(completions, ours)
        if self._tracer is not NO_TRACER:
            self._trace(batch, completions, ours)
        not_ours = len(ours) - sum(ours)
        self._metrics.add(m.NOT_OURS, not_ours)
        self.stats.results += results.total()
        self.stats.dead += dead
        self.stats.not_ours += not_ours

    @staticmethod
    def _log(completions: Sequence[Completion], ours: Sequence[bool]) -> None:
        if _log.isEnabledFor(logging.INFO):
            for completion, written in zip(completions, ours, strict=True):
                if written and isinstance(completion.outcome, DeadLetter):
                    _log.info("dead letter: %s", completion.outcome.detail, extra=log_fields.completion(completion))
                elif written:
                    _log.debug("result", extra=log_fields.completion(completion))

    def _trace(self, batch: "Batch", completions: Sequence[Completion], ours: Sequence[bool]) -> None:
        for completion, written in zip(completions, ours, strict=True):
            if not written:
                continue
            about = log_fields.completion(completion)
            traceparent = about.pop("traceparent", None)
            arrived_ns = min(int(completion.entry_id.partition("-")[0]) * 1_000_000, batch.began_ns)
            self._tracer.image(
                traceparent if isinstance(traceparent, str) else None,
                Span("image", arrived_ns, time.time_ns()),
                [Span("queue", arrived_ns, batch.began_ns), *batch.stages],
                {name: value for name, value in about.items() if isinstance(value, str | int | float)},
                completion.outcome.detail if isinstance(completion.outcome, DeadLetter) else None,
            )

    def retried(self, cause: str) -> None:
        """Count a retry, by the error's code."""
        self.stats.retries += 1
        self._metrics.add(m.RETRIES, cause=cause)

    def deferred(self, images: int) -> None:
        """Count deferrals."""
        self.stats.deferred += images
        self._metrics.add(m.RETRIES, images, cause=ModelUnavailableError.code)

    def everything_fails(self, fails: bool, /) -> None:  # noqa: FBT001 - a gauge's two values
        """Say whether no image can be judged, or no outcome written, whatever the image."""
        self._metrics.set(m.EVERYTHING_FAILS, float(fails))

    def orphaned(self, images: int) -> None:
        """Count orphans: entries that were delivered and not completed, and that nobody had pending any more."""
        if images:
            _log.warning(
                "%d images were no longer pending and had no outcome: somebody removed their consumer or acknowledged "
                "them; they are delivered again",
                images,
            )
        self.stats.orphans += images
        self._metrics.add(m.ORPHANS, images)

    def failed(self) -> None:
        """Count a bug."""
        self.stats.errors += 1
        self._metrics.add(m.ERRORS)
