"""All metrics, and the protocol that records them. Knows neither Prometheus nor Ray.

A test compares the table in `docs/reference/metrics.md` with this file. Names follow Prometheus: they end in the unit,
those of counters in `_total`. Ray adds the prefix `ray_`.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from schemas.errors import Reason
from schemas.messages import Verdict

OTHER = "other"
"""The value of the label `category` for all categories over the limit."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Name, help and labels of a metric.

    Attributes:
        name: The name in Prometheus, without Ray's prefix.
        help: One line that explains it.
        labels: Names of the labels, in order.
        values: All values of each label that has a closed set of values.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """A count that only increases.

    Attributes:
        from_zero: Export the counter as 0 before its first count, so that this is an increase. With labels, only if
            each has a closed set of values.
    """

    from_zero: bool = True

    def lines(self) -> Iterator[dict[str, str]]:
        """List the label values of every line to export as 0."""
        if self.from_zero and self.values.keys() >= set(self.labels):
            for values in itertools.product(*(self.values[label] for label in self.labels)):
                yield dict(zip(self.labels, values, strict=True))


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """A value that increases and decreases."""


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """A distribution of values.

    Attributes:
        buckets: Upper bounds, ascending and above 0 as Ray requires.
    """

    buckets: tuple[float, ...] = ()


class Metrics(Protocol):
    """Records metrics. A call takes microseconds and never blocks."""

    def add(self, counter: Counter, amount: float = 1.0, /, **labels: str) -> None:
        """Increase a counter; an amount of 0 does nothing."""
        ...

    def set(self, gauge: Gauge, value: float, /, **labels: str) -> None:
        """Set the value of a gauge."""
        ...

    def observe(self, histogram: Histogram, value: float, /, **labels: str) -> None:
        """Add a value to a histogram."""
        ...

    def forget(self, gauge: Gauge, /, **labels: str) -> None:
        """Remove the gauge with these labels, because what they name no longer exists."""
        ...


class NoMetrics:
    """`Metrics` that records nothing."""

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
    """Limits the number of values of the label `category`; further categories become `other`.

    Categories come from producers, and each takes memory of the Prometheus server in every metric with the label.

    Args:
        most: Maximum number of categories, in order of appearance.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._named: set[str] = set()

    def bounded(self, labels: dict[str, str]) -> dict[str, str]:
        """Replace a category over the limit by `other`."""
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
IMAGES = Counter("flawstream_images_total", "Images delivered to workers, redeliveries included.")
RESULTS = Counter(
    "flawstream_results_total",
    "Images completed with a result.",
    ("category", "verdict"),
    {"verdict": tuple(Verdict)},
)
DEAD_LETTERS = Counter(
    "flawstream_dead_letters_total", "Images completed as dead letters.", ("reason",), {"reason": tuple(Reason)}
)
NOT_OURS = Counter(
    "flawstream_not_ours_total", "Outcomes not written because another worker owned or had completed the image."
)
RETRIES = Counter(
    "flawstream_retries_total",
    "Retries after a transient error, by cause; for model_unavailable, images deferred.",
    ("cause",),
    {"cause": ("detector_overloaded", "everything_fails", "model_unavailable", "stream_unavailable")},
)
EVERYTHING_FAILS = Gauge(
    "flawstream_everything_fails",
    "1 while a worker can judge no image or write no outcome, whatever the image: it waits, and no delivery counts.",
)
ORPHANS = Counter(
    "flawstream_orphans_total",
    "Images delivered again because somebody else had removed their consumer or acknowledged them.",
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

# --- shards, of a worker
SHARDS_READ = Gauge("flawstream_shards_read", "Shards that a worker reads.")
SHARDS_UNREAD = Gauge(
    "flawstream_shards_unread",
    "Shards whose every reader missed its last heartbeats, as this worker sees it: aggregate with max, not sum.",
)

# --- drift, measured by workers
P_VALUE = Histogram("flawstream_p_value", "p-values of results; uniform without drift.", ("category",), buckets=_SHARES)
WINDOW_IMAGES = Gauge(
    "flawstream_window_images",
    "Latest results, of one model version, that the window and drift metrics are computed from.",
    ("category",),
)
WINDOW_SCORE = Gauge(
    "flawstream_window_score",
    "Score below which this share of the latest scores lies, nats per channel.",
    ("category", "share"),
    {"share": ("0.05", "0.5", "0.95")},
)
THRESHOLD = Gauge("flawstream_threshold", "The threshold of image scores, nats per channel.", ("category",))
DRIFT_DISTANCE = Gauge(
    "flawstream_drift_distance",
    "Kolmogorov-Smirnov distance of the latest p-values from uniform, 0 to 1.",
    ("category",),
)

# --- the streams; every worker and the API report the same values: aggregate with max, not sum
STREAM_UP = Gauge("flawstream_stream_up", "1 if the stream server answers, else 0.")
BACKLOG_IMAGES = Gauge("flawstream_backlog_images", "Images on the images streams: lag and pending.")
PENDING_IMAGES = Gauge("flawstream_pending_images", "Images delivered to workers and not yet completed.")
LAG_IMAGES = Gauge("flawstream_lag_images", "Images not yet delivered to a worker.")
ORPHANED_IMAGES = Gauge(
    "flawstream_orphaned_images", "Images that are neither pending nor undelivered; the next sweep delivers them again."
)
OLDEST_IMAGE_SECONDS = Gauge(
    "flawstream_oldest_image_seconds", "Age of the oldest image on the images streams; 0 if there is none."
)
STREAM_RESULTS = Gauge("flawstream_stream_results", "Results on the results streams.")
STREAM_DEAD_LETTERS = Gauge("flawstream_stream_dead_letters", "Dead letters on the dead-letter streams.")
STREAM_EVENTS = Counter(
    "flawstream_stream_events_total",
    "Events counted by the stream server, of all clients: refused_images, refused_bytes, refused_memory, duplicates, "
    "id_conflicts, lost_images, trimmed_results.",
    ("event",),
    {
        "event": (
            "refused_images",
            "refused_bytes",
            "refused_memory",
            "duplicates",
            "id_conflicts",
            "lost_images",
            "trimmed_results",
        )
    },
    from_zero=False,  # its first value is the server's count so far, not an increase
)

# --- producers
PUSHES = Counter(
    "flawstream_pushes_total",
    "Pushes of this process by outcome: written, or the code of the error.",
    ("outcome",),
    {"outcome": ("written", "backlog_full", "id_conflict", "stream_unavailable", "message", "config", "error")},
)
PUSH_SECONDS = Histogram(
    "flawstream_push_seconds", "Time of one push, including waiting for capacity.", buckets=_SECONDS
)

# --- captures from folders and cameras
CAPTURE_FRAMES = Counter(
    "flawstream_capture_frames_total", "Frames that the camera delivered, or files of the folder read.", ("category",)
)
CAPTURE_PUSHED = Counter("flawstream_capture_pushed_total", "Frames or files pushed.", ("category",))
CAPTURE_DROPPED = Counter(
    "flawstream_capture_dropped_total",
    "Frames dropped because the stream took them too slowly, the oldest first; a file is never dropped.",
    ("category",),
)
CAPTURE_REFUSED = Counter(
    "flawstream_capture_refused_total",
    "Frames refused because the backlog was full; frames and files refused as too large or malformed.",
    ("category",),
)
CAPTURE_RECONNECTS = Counter(
    "flawstream_capture_reconnects_total", "Times that the camera's stream ended and was opened again.", ("category",)
)

# --- the detector
DETECTOR_QUEUE_IMAGES = Gauge("flawstream_detector_queue_images", "Images in a detector's queue.")
DETECTOR_REFUSALS = Counter(
    "flawstream_detector_refusals_total", "Calls that a detector refused because its queue was full."
)
HALVINGS = Counter("flawstream_halvings_total", "Batches halved because they did not fit in memory.")
REGISTRY_UP = Gauge(
    "flawstream_registry_up",
    "1 if the registry could be read when a detector last looked and has a current version, else 0.",
)
MODEL_LOADS = Counter(
    "flawstream_model_loads_total",
    "Loads of model versions: first, swap, failed.",
    ("outcome",),
    {"outcome": ("first", "swap", "failed")},
)
RESIDENT_CATEGORIES = Gauge("flawstream_resident_categories", "Categories that a detector has loaded.")
RESIDENT_BYTES = Gauge(
    "flawstream_resident_bytes", "Memory of the loaded categories, and of unloaded versions that calls still use."
)
MODEL_INFO = Gauge(
    "flawstream_model_info",
    "1 for the loaded version of a category, 0 for earlier ones.",
    ("category", "version"),
)

# --- training
TRAINING_JOBS = Counter(
    "flawstream_training_jobs_total",
    "Finished training jobs: done, failed.",
    ("outcome",),
    {"outcome": ("done", "failed")},
)
TRAINING_IMAGES = Counter(
    "flawstream_training_images_total",
    "Images processed in training: features, training, calibrating, evaluating.",
    ("category", "stage"),
    {"stage": ("features", "training", "calibrating", "evaluating")},
)
TRAINING_EPOCH = Gauge("flawstream_training_epoch", "The current epoch, from 1.", ("category",))
TRAINING_LOSS = Gauge("flawstream_training_loss", "Mean loss of the current epoch, nats per value.", ("category",))
TRAINING_SPEED = Gauge(
    "flawstream_training_images_per_second", "Images per second that the flow is trained on.", ("category",)
)
TRAINING_LEFT = Gauge("flawstream_training_left_seconds", "Time left to train the flow, at this speed.", ("category",))

ALL: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""Every metric, in the order of this file."""
