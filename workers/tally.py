"""What a stream worker has done, counted and timed: for its status, for metrics. Knows no loop and no server."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import Reason
from schemas.messages import DeadLetter, DetectionResult
from workers import described
from workers.ports import Ending
from workers.quality import Quality

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class WorkerStats:
    """What a worker has done since it started.

    Attributes:
        read: Entries given to it, those given again included.
        batches: Batches taken up.
        results: Images that ended as results.
        dead: Images that ended as dead letters, by reason.
        not_ours: Outcomes not written because another worker had the entry, or an earlier try had ended it.
        retries: Tries that the detector or the server could not serve and that were made again.
        errors: Bugs: unexpected exceptions. Their entries stay pending.
    """

    read: int = 0
    batches: int = 0
    results: int = 0
    dead: Counter[Reason] = field(default_factory=Counter)
    not_ours: int = 0
    retries: int = 0
    errors: int = 0

    def as_dict(self) -> dict[str, object]:
        """Give it as JSON takes it."""
        return asdict(self) | {"dead": {str(reason): count for reason, count in self.dead.items()}}


class Tally:
    """Takes note of what a worker does: in its stats, and in metrics where somebody watches.

    Args:
        metrics: Where the numbers go.
        quality: Told of every result; absent: nobody is.
    """

    def __init__(self, metrics: Metrics = NO_METRICS, quality: Quality | None = None) -> None:
        self.stats = WorkerStats()
        self._metrics = metrics
        self._quality = quality

    def took_up(self, images: int, queued_s: float) -> None:
        """Note a batch and how long its oldest image had waited."""
        self.stats.batches += 1
        self.stats.read += images
        self._metrics.add(m.IMAGES, images)
        self._metrics.observe(m.BATCH_IMAGES, images, stage="read")
        self.spent("queue", queued_s)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what a batch spends in a stage, tries made again included; one that fails is not counted."""
        began_s = time.perf_counter()
        yield
        self.spent(name, time.perf_counter() - began_s)

    def spent(self, stage: str, duration_s: float) -> None:
        """Note what a batch spent in a stage."""
        self._metrics.observe(m.STAGE_SECONDS, duration_s, stage=stage)

    def ended(self, endings: Sequence[Ending], ours: Sequence[bool]) -> None:
        """Note how the images of a batch ended.

        Args:
            endings: What came of them.
            ours: For each, whether it was written.
        """
        results: Counter[tuple[str, str]] = Counter()
        dead: Counter[Reason] = Counter()
        for ending, written in zip(endings, ours, strict=True):
            match ending.outcome:
                case DetectionResult() as result if written:
                    results[result.category, result.verdict.value] += 1
                    self._metrics.observe(m.IMAGE_SECONDS, result.total_ms / 1000)
                    if self._quality is not None:
                        self._quality.saw(result)
                case DeadLetter(reason=reason) if written:
                    dead[reason] += 1
        for (category, verdict), count in results.items():
            self._metrics.add(m.RESULTS, count, category=category, verdict=verdict)
        for reason, count in dead.items():
            self._metrics.add(m.DEAD_LETTERS, count, reason=reason.value)
        self._log(endings, ours)
        not_ours = len(ours) - sum(ours)
        self._metrics.add(m.NOT_OURS, not_ours)
        self.stats.results += results.total()
        self.stats.dead += dead
        self.stats.not_ours += not_ours

    @staticmethod
    def _log(endings: Sequence[Ending], ours: Sequence[bool]) -> None:
        if _log.isEnabledFor(logging.INFO):
            for ending, written in zip(endings, ours, strict=True):
                if written and isinstance(ending.outcome, DeadLetter):
                    _log.info("dead letter: %s", ending.outcome.detail, extra=described.ending(ending))
                elif written:
                    _log.debug("result", extra=described.ending(ending))

    def tried_again(self, cause: str) -> None:
        """Note a try made again, by the error's code."""
        self.stats.retries += 1
        self._metrics.add(m.RETRIES, cause=cause)

    def failed(self) -> None:
        """Note a bug."""
        self.stats.errors += 1
        self._metrics.add(m.ERRORS)
