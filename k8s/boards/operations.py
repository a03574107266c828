"""The board of whoever is called at night: does it work, how much waits, what was refused, where the time goes."""

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
    "Whether workers reach the Redis server. While they do not, nothing is read and producers cannot push.",
    Query(f"min(max by (namespace) ({select(m.STREAM_UP)}))", "stream server"),
    runbook="FlawstreamStreamDown",
    words={"1": ("up", "green"), "0": ("down", "red")},
)
_ALERTS = number(
    "Alerts",
    "none",
    "Alerts of ours that fire now. Each has a runbook; Alertmanager and the Prometheus server's page Alerts list them.",
    Query(f'count(ALERTS{{{NAMESPACE}, alertname=~"Flawstream.+", alertstate="firing"}}) or vector(0)', "firing"),
    limit=1,
)
_WAITING = number(
    "Images waiting",
    IMAGES,
    "Images on the streams, waiting or in hand. Read it beside the age of the oldest.",
    Query(of_the_streams(m.BACKLOG_IMAGES), "waiting"),
    runbook="FlawstreamBacklogGrows",
)
_AGE = number(
    "Oldest image",
    "s",
    "Age of the oldest image that has not ended. Above a minute, parts have left the line without a verdict.",
    Query(of_the_streams(m.OLDEST_IMAGE_SECONDS), "oldest"),
    runbook="FlawstreamImagesLate",
    limit=60,
)
_RESULTS = number(
    "Results",
    IMAGES_PER_S,
    "Results a second. 0 while images wait means that nothing is judged.",
    Query(per_second(m.RESULTS), "results"),
    runbook="FlawstreamNoResults",
)
_REFUSED = number(
    "Dead letters, last hour",
    IMAGES,
    "Images that could not be judged. `flawstream dead list` says which, and why.",
    Query(counted(m.DEAD_LETTERS, window="1h"), "dead letters"),
    runbook="FlawstreamDeadLetters",
    limit=1,
)

_THROUGHPUT = lines(
    "Images",
    IMAGES_PER_S,
    "Given to workers, and how they ended. Given stays above ended only while something is given out again.",
    Query(per_second(m.IMAGES), "given to workers"),
    Query(per_second(m.RESULTS), "results"),
    Query(per_second(m.DEAD_LETTERS), "dead letters"),
    runbook="FlawstreamNoResults",
    width=6,
)
_PUSHES = lines(
    "Pushes by outcome",
    IMAGES_PER_S,
    "Of producers that are scraped: the HTTP API and Python producers. Anything but `written` is a part that is not "
    "looked at until it is pushed again.",
    Query(per_second(m.PUSHES, "outcome"), "{{outcome}}"),
    runbook="FlawstreamProducersRefused",
    width=6,
)
_PUSH_TIME = lines(
    "Time of a push",
    "s",
    "Of the same producers, waiting for room included. Seconds: the backlog is full and pushes wait. Else the network "
    "or the stream server's disk (`appendfsync`).",
    *(Query(quantile(share, m.PUSH_SECONDS), f"p{share * 100:g}") for share in (0.5, 0.99)),
    width=6,
)
_EVENTS = lines(
    "Refused, duplicate, trimmed",
    IMAGES_PER_S,
    "What the stream server counted, whoever pushed. `refused_*`: a bound of the backlog is reached, add workers or "
    "slow the line. `trimmed_results`: old results that were taken off; read faster or raise "
    "`backlog.keep_results` where nobody had read them.",
    Query(events_of_the_streams(m.STREAM_EVENTS, "event"), "{{event}}"),
    runbook="FlawstreamProducersRefused",
    width=6,
)

_BACKLOG = lines(
    "Backlog",
    IMAGES,
    "All images on the streams, those in hand, and those not yet given out. In hand and not falling: workers hang. "
    "Not given out and growing: too few workers, or detectors too slow.",
    Query(of_the_streams(m.BACKLOG_IMAGES), "all"),
    Query(of_the_streams(m.PENDING_IMAGES), "in hand"),
    Query(of_the_streams(m.LAG_IMAGES), "not yet given out"),
    runbook="FlawstreamBacklogGrows",
)
_OLDEST = lines(
    "Age of the oldest image",
    "s",
    "A line that climbs one second a second is one image, or all of them, that nobody ends.",
    Query(of_the_streams(m.OLDEST_IMAGE_SECONDS), "oldest"),
    runbook="FlawstreamImagesLate",
    limit=60,
)
_KEPT = lines(
    "Kept on the streams",
    IMAGES,
    "Results and dead letters that lie on their streams. Dead letters stay until they are replayed or purged: "
    "`flawstream dead replay`, `flawstream dead purge`.",
    Query(of_the_streams(m.STREAM_RESULTS), "results"),
    Query(of_the_streams(m.STREAM_DEAD_LETTERS), "dead letters"),
)

_DEAD = lines(
    "Dead letters by reason",
    IMAGES,
    "Images of each interval that could not be judged. `poison`: it took workers down with it; the log says how.",
    Query(counted(m.DEAD_LETTERS, "reason"), "{{reason}}"),
    runbook="FlawstreamDeadLetters",
    bars=True,
)
_RETRIES = lines(
    "Tries made again",
    "suffix: /s",
    "`detector_overloaded`: no detector had room or answered in time, add some. `model_unavailable`: images that "
    "wait because the current version of their category cannot be used. `stream_unavailable`: Redis did not answer.",
    Query(per_second(m.RETRIES, "cause"), "{{cause}}"),
)
_BUGS = lines(
    "Unexpected errors",
    "none",
    "Errors that nobody foresaw, with a traceback in the workers' log; and outcomes dropped because another worker had "
    "ended the image, which is right after a pause or a restart and costs work alone.",
    Query(counted(m.ERRORS), "unexpected errors"),
    Query(counted(m.NOT_OURS), "ended by another worker"),
    runbook="FlawstreamUnexpectedErrors",
    bars=True,
)

_LATENCY = lines(
    "From arrival to result",
    "s",
    "Time on the stream and in a worker. Where it grows and the stages do not, images wait: see the backlog.",
    *(Query(quantile(share, m.IMAGE_SECONDS), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)),
    runbook="FlawstreamImagesLate",
)
_STAGES = lines(
    "Time of a batch, by stage (p95)",
    "s",
    "`decode` high: large images, give workers more CPU. `detect` high: larger batches or a slower engine. `wait` "
    "high: too few detectors. `publish` high: the stream server is slow. `call` holds `wait` and `detect`.",
    Query(quantile(0.95, m.STAGE_SECONDS, "stage"), "{{stage}}"),
)
_MEANS = lines(
    "Time of a batch, by stage (mean)",
    "s",
    "The same in the mean: what a second of an image's time is made of.",
    Query(mean(m.STAGE_SECONDS, "stage"), "{{stage}}"),
)

_BATCHES = lines(
    "Images of a batch",
    IMAGES,
    "In the mean. `detect` near 1 with images waiting: workers read too few at once (`worker.batch_size`).",
    Query(mean(m.BATCH_IMAGES, "stage"), "{{stage}}"),
)
_QUEUE = lines(
    "Detector queue",
    IMAGES,
    "Images that wait for a detector's next batch, all detectors together. Always full: add detectors.",
    Query(f"sum({select(m.DETECTOR_QUEUE_IMAGES)})", "waiting"),
)
_FULL = lines(
    "Refused or halved",
    "none",
    "Calls refused because a detector's queue was full, and batches that did not fit in memory. Halved again and "
    "again: lower `detector.max_batch_images`.",
    Query(counted(m.DETECTOR_REFUSALS), "calls refused"),
    Query(counted(m.HALVINGS), "batches halved"),
    runbook="FlawstreamBatchesHalved",
    bars=True,
)
_LOADS = lines(
    "Models loaded",
    "none",
    "`first`: loaded for the first time, or again after it made room for another. `swap`: another version was "
    "promoted. `failed`: a version that cannot be loaded; the former one serves on, or the images wait.",
    Query(counted(m.MODEL_LOADS, "outcome"), "{{outcome}}"),
    runbook="FlawstreamModelLoadFails",
    bars=True,
)
_RESIDENT = lines(
    "Categories loaded",
    "none",
    "Of the detector that has most. It falls and rises where `detector.max_resident_mb` is too little for what comes.",
    Query(f"max({select(m.RESIDENT_CATEGORIES)})", "categories"),
)
_MEMORY = lines(
    "Memory of loaded categories",
    "bytes",
    "Of the detector that needs most; bounded by `detector.max_resident_mb`.",
    Query(f"max({select(m.RESIDENT_BYTES)})", "memory"),
)

_REPLICAS = lines(
    "Replicas that are well",
    "none",
    "Of each deployment, as Ray Serve sees it. Fewer than there should be: see the deployment in Ray's dashboard.",
    Query(f"sum by (deployment) ({select('ray_serve_deployment_replica_healthy')})", "{{deployment}}"),
    runbook="FlawstreamReplicasRestart",
    width=12,
)
_STARTS = lines(
    "Replicas and workers started",
    "none",
    "Replicas started within a quarter of an hour, updates and scaling included, and restarts of `flawstream worker`.",
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
    width=12,
)

BOARD = Board(
    uid="flawstream-operations",
    title="flawstream: operations",
    description="Does it work, how much waits, what was refused and why, and where the time of an image goes.",
    variables=[choice("namespace", "Namespace", f"label_values({m.STREAM_UP.name}, namespace)", several=True)],
    rows=[
        ("Does it work?", [_STREAM, _ALERTS, _WAITING, _AGE, _RESULTS, _REFUSED]),
        ("Throughput", [_THROUGHPUT, _PUSHES, _PUSH_TIME, _EVENTS]),
        ("Backlog", [_BACKLOG, _OLDEST, _KEPT]),
        ("What went wrong", [_DEAD, _RETRIES, _BUGS]),
        ("Where the time goes", [_LATENCY, _STAGES, _MEANS]),
        ("Detectors", [_BATCHES, _QUEUE, _FULL, _LOADS, _RESIDENT, _MEMORY]),
        ("Replicas", [_REPLICAS, _STARTS]),
    ],
)
