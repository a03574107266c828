"""The board for whoever is on call: health, backlog, dead letters, errors, and time per stage."""

from flawstream.telemetry import metrics as m
from k8s.boards.panels import IMAGES, IMAGES_PER_S, Board, Query, choice, lines, number
from k8s.boards.queries import (
    NAMESPACE,
    counted,
    events_of_the_streams,
    mean,
    of_the_streams,
    per_second,
    quantile,
    select,
)

_STREAM = number(
    "Stream server",
    "none",
    "Whether any worker reaches the Redis server. While it is down, nothing is judged and producers cannot push.",
    Query(f"min(max by (namespace) ({select(m.STREAM_UP)}))", "stream server"),
    runbook="FlawstreamStreamDown",
    words={"1": ("up", "green"), "0": ("down", "red")},
)
_ALERTS = number(
    "Alerts",
    "none",
    "Firing alerts of flawstream. Each has a runbook; Alertmanager and Prometheus's Alerts page list them.",
    Query(f'count(ALERTS{{{NAMESPACE}, alertname=~"Flawstream.+", alertstate="firing"}}) or vector(0)', "firing"),
    limit=1,
)
_WAITING = number(
    "Backlog now",
    IMAGES,
    "Images on the images streams, pending ones included. Read it together with the age of the oldest.",
    Query(of_the_streams(m.BACKLOG_IMAGES), "backlog"),
    runbook="FlawstreamBacklogGrows",
)
_AGE = number(
    "Oldest image",
    "s",
    "Age of the oldest image without an outcome. Above a minute, parts may have left the line without a verdict.",
    Query(of_the_streams(m.OLDEST_IMAGE_SECONDS), "oldest"),
    runbook="FlawstreamImagesLate",
    limit=60,
)
_RESULTS = number(
    "Results",
    IMAGES_PER_S,
    "Results a second. 0 while there is a backlog: nothing is judged.",
    Query(per_second(m.RESULTS), "results"),
    runbook="FlawstreamNoResults",
)
_REFUSED = number(
    "Dead letters, last hour",
    IMAGES,
    "Images that could not be judged. `flawstream dead list` shows them with the reason.",
    Query(counted(m.DEAD_LETTERS, window="1h"), "dead letters"),
    runbook="FlawstreamDeadLetters",
    limit=1,
)

_THROUGHPUT = lines(
    "Images",
    IMAGES_PER_S,
    "Images delivered to workers, and their outcomes. Deliveries exceed outcomes only while images are redelivered.",
    Query(per_second(m.IMAGES), "delivered"),
    Query(per_second(m.RESULTS), "results"),
    Query(per_second(m.DEAD_LETTERS), "dead letters"),
    runbook="FlawstreamNoResults",
    width=6,
)
_PUSHES = lines(
    "Pushes by outcome",
    IMAGES_PER_S,
    "By producers that Prometheus scrapes: the HTTP API and Python producers. An image with an outcome other than "
    "`written` is not judged until it is pushed again.",
    Query(per_second(m.PUSHES, "outcome"), "{{outcome}}"),
    runbook="FlawstreamProducersRefused",
    width=6,
)
_PUSH_TIME = lines(
    "Time of a push",
    "s",
    "By the same producers, retries included. Seconds: the backlog is full and pushes are retried, or the network or "
    "the stream server's disk (`appendfsync`) is slow.",
    *(Query(quantile(share, m.PUSH_SECONDS), f"p{share * 100:g}") for share in (0.5, 0.99)),
    width=6,
)
_EVENTS = lines(
    "Refused, duplicate, trimmed",
    IMAGES_PER_S,
    "Counted by the stream server, for all producers. `refused_*`: the backlog is full; add workers or slow the line. "
    "`trimmed_results`: old results that were deleted; if they had not been read, read faster or raise "
    "`backlog.keep_results`.",
    Query(events_of_the_streams(m.STREAM_EVENTS, "event"), "{{event}}"),
    runbook="FlawstreamProducersRefused",
    width=6,
)

_BACKLOG = lines(
    "Backlog",
    IMAGES,
    "The backlog is the lag (images not yet delivered) and the pending images (delivered, no outcome yet). Pending "
    "does not fall: workers hang. Lag grows: too few workers, or detectors too slow.",
    Query(of_the_streams(m.BACKLOG_IMAGES), "backlog"),
    Query(of_the_streams(m.PENDING_IMAGES), "pending"),
    Query(of_the_streams(m.LAG_IMAGES), "lag"),
    Query(of_the_streams(m.ORPHANED_IMAGES), "orphans"),
    runbook="FlawstreamBacklogGrows",
)
_OLDEST = lines(
    "Age of the oldest image",
    "s",
    "If it rises by one second a second, the oldest image, or all, get no outcome.",
    Query(of_the_streams(m.OLDEST_IMAGE_SECONDS), "oldest"),
    runbook="FlawstreamImagesLate",
    limit=60,
)
_KEPT = lines(
    "Results and dead letters kept",
    IMAGES,
    "Length of the results and dead-letter streams. Dead letters stay until they are replayed or purged: "
    "`flawstream dead replay`, `flawstream dead purge`.",
    Query(of_the_streams(m.STREAM_RESULTS), "results"),
    Query(of_the_streams(m.STREAM_DEAD_LETTERS), "dead letters"),
)

_DEAD = lines(
    "Dead letters by reason",
    IMAGES,
    "Images per interval that could not be judged. `poison`: no worker could complete it; see the workers' log.",
    Query(counted(m.DEAD_LETTERS, "reason"), "{{reason}}"),
    runbook="FlawstreamDeadLetters",
    bars=True,
)
_RETRIES = lines(
    "Retries",
    "suffix: /s",
    "`detector_overloaded`: no detector had capacity or answered in time; add detectors. `model_unavailable`: images "
    "deferred because their category's version cannot be used. `stream_unavailable`: Redis did not answer.",
    Query(per_second(m.RETRIES, "cause"), "{{cause}}"),
    Query(f"max({select(m.EVERYTHING_FAILS)})", "everything fails (1: now)"),
    runbook="FlawstreamEverythingFails",
)
_BUGS = lines(
    "Unexpected errors",
    "none",
    "Bugs, with a traceback in the workers' log. Also outcomes that were dropped because another worker had completed "
    "the image: normal after a pause or a restart.",
    Query(counted(m.ERRORS), "unexpected errors"),
    Query(counted(m.NOT_OURS), "completed by another worker"),
    Query(counted(m.ORPHANS), "orphans, delivered again"),
    runbook="FlawstreamUnexpectedErrors",
    bars=True,
)

_LATENCY = lines(
    "From arrival to result",
    "s",
    "Time on the stream and in a worker. If it grows and the stages do not, images wait: see the backlog.",
    *(Query(quantile(share, m.IMAGE_SECONDS), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)),
    runbook="FlawstreamImagesLate",
)
_STAGES = lines(
    "Time of a batch, by stage (p95)",
    "s",
    "`decode` high: large images, give workers more CPU. `detect` high: larger batches or a slower engine. `wait` "
    "high: too few detectors. `publish` high: the stream server is slow. `call` includes `wait` and `detect`.",
    Query(quantile(0.95, m.STAGE_SECONDS, "stage"), "{{stage}}"),
)
_MEANS = lines(
    "Time of a batch, by stage (mean)",
    "s",
    "The same as means, which can be added up.",
    Query(mean(m.STAGE_SECONDS, "stage"), "{{stage}}"),
)

_BATCHES = lines(
    "Batch size",
    IMAGES,
    "Mean images per batch. `detect` near 1 with a backlog: workers read too few at a time (`worker.batch_size`).",
    Query(mean(m.BATCH_IMAGES, "stage"), "{{stage}}"),
)
_QUEUE = lines(
    "Detector queue",
    IMAGES,
    "Images in the queues of all detectors. Always full: add detectors.",
    Query(f"sum({select(m.DETECTOR_QUEUE_IMAGES)})", "queued"),
)
_FULL = lines(
    "Refused or halved",
    "none",
    "Calls refused because a detector's queue was full, and batches halved because they did not fit in memory. Halved "
    "repeatedly: lower `detector.max_batch_images`.",
    Query(counted(m.DETECTOR_REFUSALS), "calls refused"),
    Query(counted(m.HALVINGS), "batches halved"),
    runbook="FlawstreamBatchesHalved",
    bars=True,
)
_LOADS = lines(
    "Versions loaded",
    "none",
    "`first`: first load of a category, or a reload after it was unloaded. `swap`: a promoted version replaced the "
    "loaded one. `failed`: it cannot be loaded; the version before keeps serving, or the images stay pending.",
    Query(counted(m.MODEL_LOADS, "outcome"), "{{outcome}}"),
    runbook="FlawstreamModelLoadFails",
    bars=True,
)
_RESIDENT = lines(
    "Categories loaded",
    "none",
    "Of the detector with the most. If it goes up and down, `detector.max_resident_mb` is too low. `registry`: 0 if a "
    "detector cannot read it.",
    Query(f"max({select(m.RESIDENT_CATEGORIES)})", "categories"),
    Query(f"min({select(m.REGISTRY_UP)})", "registry"),
    runbook="FlawstreamRegistryDown",
)
_MEMORY = lines(
    "Memory of loaded categories",
    "bytes",
    "Of the detector that uses most; limited by `detector.max_resident_mb`.",
    Query(f"max({select(m.RESIDENT_BYTES)})", "memory"),
)

_REPLICAS = lines(
    "Healthy replicas",
    "none",
    "Of each deployment, as reported by Ray Serve. Fewer than expected: see the deployment in Ray's dashboard.",
    Query(f"sum by (deployment) ({select('ray_serve_deployment_replica_healthy')})", "{{deployment}}"),
    runbook="FlawstreamReplicasRestart",
)
_STARTS = lines(
    "Replicas and workers started",
    "none",
    "Replicas started within 15 minutes, including updates and scaling, and restarts of `flawstream worker`.",
    Query(
        counted("ray_serve_replica_startup_latency_ms_count", "deployment", window="15m"),
        "{{deployment}}",
    ),
    Query(
        f"sum by (instance) (changes({select('process_start_time_seconds')}[15m])"
        f" and on (namespace, job, instance) {select(m.STREAM_UP)})",
        "worker {{instance}}",
    ),
    runbook="FlawstreamReplicasRestart",
)

_SHARDS = lines(
    "Shards",
    "none",
    "Shards whose readers missed their last heartbeats (`unread`, 0 within seconds), and the shards that each worker "
    "reads, added up: more than there are, as neighbours read some together.",
    Query(f"max({select(m.SHARDS_UNREAD)})", "unread"),
    Query(f"sum({select(m.SHARDS_READ)})", "read"),
)

BOARD = Board(
    uid="flawstream-operations",
    title="flawstream: operations",
    description="Health, backlog, dead letters and errors, and the time of each stage.",
    variables=[choice("namespace", "Namespace", f"label_values({m.STREAM_UP.name}, namespace)", several=True)],
    rows=[
        ("Health", [_STREAM, _ALERTS, _WAITING, _AGE, _RESULTS, _REFUSED]),
        ("Throughput", [_THROUGHPUT, _PUSHES, _PUSH_TIME, _EVENTS]),
        ("Backlog", [_BACKLOG, _OLDEST, _KEPT]),
        ("Errors", [_DEAD, _RETRIES, _BUGS]),
        ("Latency", [_LATENCY, _STAGES, _MEANS]),
        ("Detectors", [_BATCHES, _QUEUE, _FULL, _LOADS, _RESIDENT, _MEMORY]),
        ("Replicas", [_REPLICAS, _STARTS, _SHARDS]),
    ],
)
