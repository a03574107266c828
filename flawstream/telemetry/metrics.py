"""Every metric there is, and the protocol by which they are recorded. Knows neither Prometheus nor Ray.

`docs/reference/metrics.md` has them as a table, which a test compares with this file. Names follow Prometheus: the unit
ends a name, counters end in `_total`. Ray puts `ray_` before each name.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from schemas.errors import Reason
from schemas.messages import Verdict

OTHER = "other"
"""The category label of all categories past the bound."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What is measured.

    Attributes:
        name: As Prometheus has it, without Ray's prefix.
        help: One line for a person.
        labels: Names of its labels, in order.
        values: All values of a label, where they are a closed set.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """Only ever grows.

    Attributes:
        from_zero: Told as 0 before it counted, so that a first count is an increase: where it has labels, all of them
            closed sets.
    """

    from_zero: bool = True

    def lines(self) -> Iterator[dict[str, str]]:
        """Give the labels of every line that is told from 0."""
        if self.from_zero and self.values.keys() >= set(self.labels):
            for values in itertools.product(*(self.values[label] for label in self.labels)):
                yield dict(zip(self.labels, values, strict=True))


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """Goes up and down."""


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """How values spread.

    Attributes:
        buckets: Upper bounds, ascending and above 0 (Ray takes no others).
    """

    buckets: tuple[float, ...] = ()


class Metrics(Protocol):
    """Takes what was measured. Cheap: some microseconds a call, and never a wait."""

    def add(self, counter: Counter, amount: float = 1.0, /, **labels: str) -> None:
        """Count; an amount of 0 is nothing."""
        ...

    def set(self, gauge: Gauge, value: float, /, **labels: str) -> None:
        """Say how it is now."""
        ...

    def observe(self, histogram: Histogram, value: float, /, **labels: str) -> None:
        """Take one value more."""
        ...

    def forget(self, gauge: Gauge, /, **labels: str) -> None:
        """Say that what these labels name is no more."""
        ...


class NoMetrics:
    """`Metrics` for whoever is not watched."""

    def add(self, counter: Counter, amount: float = 1.0, /, **labels: str) -> None:
        """Do nothing."""

    def set(self, gauge: Gauge, value: float, /, **labels: str) -> None:
        """Do nothing."""

    def observe(self, histogram: Histogram, value: float, /, **labels: str) -> None:
        """Do nothing."""

    def forget(self, gauge: Gauge, /, **labels: str) -> None:
        """Do nothing."""


NO_METRICS = NoMetrics()


class CategoryLabels:
    """Bounds how many values the label `category` has: whoever comes past the bound is `other`.

    Categories come from outside; each costs the Prometheus server memory in every metric that has the label.

    Args:
        most: Categories that are named, in the order they come.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._named: set[str] = set()

    def bounded(self, labels: dict[str, str]) -> dict[str, str]:
        """Give labels whose category is one that is named, or `other`."""
        category = labels.get("category")
        if category is None or category in self._named:
            return labels
        if len(self._named) < self._most:
            self._named.add(category)
            return labels
        return labels | {"category": OTHER}


_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# --- the stream worker
IMAGES = Counter("flawstream_images_total", "Images that workers were given, those given again included.")
RESULTS = Counter(
    "flawstream_results_total",
    "Images that ended as results.",
    ("category", "verdict"),
    {"verdict": tuple(Verdict)},
)
DEAD_LETTERS = Counter(
    "flawstream_dead_letters_total", "Images that ended as dead letters.", ("reason",), {"reason": tuple(Reason)}
)
NOT_OURS = Counter(
    "flawstream_not_ours_total", "Outcomes not written because another worker had ended the image or had it in hand."
)
RETRIES = Counter(
    "flawstream_retries_total",
    "Tries that the detector or the stream server could not serve, made again; images for model_unavailable.",
    ("cause",),
    {"cause": ("detector_overloaded", "model_unavailable", "stream_unavailable")},
)
ERRORS = Counter("flawstream_errors_total", "Unexpected errors of a worker: bugs. Their images stay pending.")
IMAGE_SECONDS = Histogram(
    "flawstream_image_seconds",
    "From an image's arrival at the stream server to its result.",
    buckets=(*_SECONDS, 300.0, 1800.0),
)
STAGE_SECONDS = Histogram(
    "flawstream_stage_seconds",
    "Time of one batch in one stage: read, queue, decode, call, encode, publish (workers), wait, detect (detectors).",
    ("stage",),
    {"stage": ("read", "queue", "decode", "call", "encode", "publish", "wait", "detect")},
    buckets=_SECONDS,
)
BATCH_IMAGES = Histogram(
    "flawstream_batch_images",
    "Images of one batch, as it was read (read) or detected (detect).",
    ("stage",),
    {"stage": ("read", "detect")},
    buckets=_IMAGES,
)

# --- quality, as workers see it
P_VALUE = Histogram(
    "flawstream_p_value", "p-values of results; uniform as long as nothing drifts.", ("category",), buckets=_SHARES
)
WINDOW_IMAGES = Gauge(
    "flawstream_window_images", "Latest results that the following are taken from, of one model version.", ("category",)
)
WINDOW_SCORE = Gauge(
    "flawstream_window_score",
    "Quantiles of the latest scores, nats per channel.",
    ("category", "quantile"),
    {"quantile": ("0.05", "0.5", "0.95")},
)
THRESHOLD = Gauge("flawstream_threshold", "A score above it is anomalous, nats per channel.", ("category",))
DRIFT_DISTANCE = Gauge(
    "flawstream_drift_distance",
    "Kolmogorov-Smirnov distance of the latest p-values from uniform: 0 as calibrated, 1 nothing in common.",
    ("category",),
)

# --- the streams, as every worker and the API read them: take the maximum, not the sum
STREAM_UP = Gauge("flawstream_stream_up", "1 where the stream server answers, 0 where it does not.")
BACKLOG_IMAGES = Gauge("flawstream_backlog_images", "Images on the images streams, waiting or in hand.")
PENDING_IMAGES = Gauge("flawstream_pending_images", "Images that workers have in hand.")
LAG_IMAGES = Gauge("flawstream_lag_images", "Images that were not yet given to a worker.")
OLDEST_IMAGE_SECONDS = Gauge(
    "flawstream_oldest_image_seconds", "Age of the oldest image on the images streams; 0 where there is none."
)
STREAM_RESULTS = Gauge("flawstream_stream_results", "Results on their streams.")
STREAM_DEAD_LETTERS = Gauge("flawstream_stream_dead_letters", "Dead letters on their streams.")
STREAM_EVENTS = Counter(
    "flawstream_stream_events_total",
    "What the stream server counted, whoever pushed: refused_images, refused_bytes, refused_memory, duplicates, "
    "trimmed_results.",
    ("event",),
    {"event": ("refused_images", "refused_bytes", "refused_memory", "duplicates", "trimmed_results")},
    from_zero=False,  # it begins with what the server has counted so far, which is no increase
)

# --- producers
PUSHES = Counter(
    "flawstream_pushes_total",
    "Pushes of this process by outcome: written, or the code of the error, such as backlog_full.",
    ("outcome",),
    {"outcome": ("written", "backlog_full", "stream_unavailable", "message", "config", "error")},
)
PUSH_SECONDS = Histogram("flawstream_push_seconds", "Time of one push, waiting for room included.", buckets=_SECONDS)

# --- the detector
DETECTOR_QUEUE_IMAGES = Gauge("flawstream_detector_queue_images", "Images waiting for a detector's next batch.")
DETECTOR_REFUSALS = Counter("flawstream_detector_refusals_total", "Calls that a detector refused: its queue was full.")
HALVINGS = Counter("flawstream_halvings_total", "Batches that did not fit in memory and were halved.")
MODEL_LOADS = Counter(
    "flawstream_model_loads_total",
    "Model versions made ready, or not: first, swap, failed.",
    ("outcome",),
    {"outcome": ("first", "swap", "failed")},
)
RESIDENT_CATEGORIES = Gauge("flawstream_resident_categories", "Categories that a detector has loaded.")
RESIDENT_BYTES = Gauge("flawstream_resident_bytes", "Memory that the loaded categories take.")
MODEL_INFO = Gauge(
    "flawstream_model_info",
    "1 for the version of a category that is loaded, 0 for one that was.",
    ("category", "version"),
)

# --- training
TRAINING_JOBS = Counter(
    "flawstream_training_jobs_total",
    "Training jobs that ended: done, failed.",
    ("outcome",),
    {"outcome": ("done", "failed")},
)
TRAINING_IMAGES = Counter(
    "flawstream_training_images_total",
    "Images gone through in training: features, training, calibrating, evaluating.",
    ("category", "stage"),
    {"stage": ("features", "training", "calibrating", "evaluating")},
)
TRAINING_EPOCH = Gauge("flawstream_training_epoch", "The epoch under way, from 1.", ("category",))
TRAINING_LOSS = Gauge("flawstream_training_loss", "Mean loss of the epoch so far, nats per value.", ("category",))

ALL: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""Every metric, in the order of this file."""
