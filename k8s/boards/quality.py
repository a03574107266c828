"""The board of verdict quality: each category's anomalous share, scores, drift and version."""

from flawstream.telemetry import metrics as m
from k8s.boards.panels import IMAGES, IMAGES_PER_S, Board, Panel, Query, buckets, choice, lines, number
from k8s.boards.queries import counted, per_second, select

DRIFT_LIMIT = 0.3
"""The alert's limit."""
DRIFT_IMAGES = 100
"""The alert's minimum of images in a window."""

_ONE = 'category="$category"'
_WINDOW = "30m"
"""Longer than for other rates, because anomalous results are rare."""


def _anomalous(matchers: str = "") -> str:
    """Return the share of anomalous results; 0, and not empty, if none is anomalous."""
    comma = ", " if matchers else ""
    total = per_second(m.RESULTS, "category", matchers, _WINDOW)
    anomalous = per_second(m.RESULTS, "category", f'{matchers}{comma}verdict="anomalous"', _WINDOW)
    return f"({anomalous} or 0 * {total}) / {total}"


def _drift(by: str, matchers: str = "") -> str:
    return f"max by ({by}) ({select(m.DRIFT_DISTANCE, matchers)})"


def _share(width: int, title: str, query: Query) -> Panel:
    return lines(
        title,
        "percentunit",
        "Share of anomalous results over half an hour. A step without a cause on the line is drift, or another "
        "version: look at some maps, then at the scores below.",
        query,
        width=width,
    )


BOARD = Board(
    uid="flawstream-quality",
    title="flawstream: quality",
    description="For each category: share of anomalous parts, scores, drift and loaded version.",
    variables=[
        choice("namespace", "Namespace", f"label_values({m.P_VALUE.name}_count, namespace)", several=True),
        choice("category", "Category", f"label_values({select(m.P_VALUE.name + '_count')}, category)", several=False),
    ],
    rows=[
        (
            "All categories",
            [
                _share(8, "Anomalous", Query(_anomalous(), "{{category}}")),
                lines(
                    "Drift",
                    "none",
                    "Distance of the latest p-values from uniform; 0: as calibrated. Above the line, scores have "
                    "changed: light, focus, fixture, or many anomalous parts.",
                    Query(f"topk(10, {_drift('category')})", "{{category}}"),
                    runbook="FlawstreamDrift",
                    limit=DRIFT_LIMIT,
                    most=1,
                ),
                lines(
                    "Results",
                    IMAGES_PER_S,
                    "Results of each category. `other`: categories beyond `metrics.max_categories`.",
                    Query(per_second(m.RESULTS, "category"), "{{category}}"),
                ),
            ],
        ),
        (
            "$category",
            [
                number(
                    "Version",
                    "none",
                    "Version that detectors have loaded. Two: a swap is in progress, or a detector could not load the "
                    "new one.",
                    Query(f"max by (version) ({select(m.MODEL_INFO, _ONE)} == 1)", "{{version}}"),
                    runbook="FlawstreamModelLoadFails",
                    name_only=True,
                ),
                number(
                    "Images, last day",
                    IMAGES,
                    "Results of this category within 24 hours.",
                    Query(counted(m.RESULTS, "category", _ONE, "1d"), "images"),
                ),
                number(
                    "Anomalous, last day",
                    "percentunit",
                    "Share of anomalous results within 24 hours. Compare it with what inspectors find.",
                    Query(_anomalous(_ONE).replace(f"[{_WINDOW}]", "[1d]"), "anomalous"),
                ),
                number(
                    "Drift now",
                    "none",
                    "Distance of the latest p-values from uniform; above 0.3 is drift, if the window has at least 100 "
                    "images.",
                    Query(_drift("category", _ONE), "drift"),
                    runbook="FlawstreamDrift",
                    limit=DRIFT_LIMIT,
                ),
                number(
                    "Window",
                    IMAGES,
                    "Number of latest results behind drift and quantiles. Below 100, ignore drift.",
                    Query(f"max by (category) ({select(m.WINDOW_IMAGES, _ONE)})", "window"),
                ),
                number(
                    "Threshold",
                    "none",
                    "A score above it is anomalous, nats per channel. Set by the version's calibration.",
                    Query(f"max by (category) ({select(m.THRESHOLD, _ONE)})", "threshold"),
                ),
                lines(
                    "Scores and threshold",
                    "none",
                    "Quantiles of the latest scores, nats per channel, averaged over workers. If the median approaches "
                    "the threshold: drift. If only the highest does: more anomalous parts.",
                    Query(f"avg by (share) ({select(m.WINDOW_SCORE, _ONE)})", "quantile {{share}}"),
                    Query(f"max by (category) ({select(m.THRESHOLD, _ONE)})", "threshold"),
                    width=12,
                ),
                buckets(
                    "p-values",
                    "short",
                    "Results by p-value; the axis shows the buckets' upper bounds. p-values of normal parts are "
                    "uniform. Many low ones: anomalous parts or drift. Many high ones: drift to lower scores.",
                    Query(counted(f"{m.P_VALUE.name}_bucket", "le", _ONE), "{{le}}"),
                    width=12,
                ),
                _share(8, "Anomalous", Query(_anomalous(_ONE), "anomalous")),
                lines(
                    "p-value of 0.05 or less",
                    "percentunit",
                    "Share of results with a p-value of at most 0.05; 5 % if all parts are normal.",
                    Query(
                        per_second(f"{m.P_VALUE.name}_bucket", "category", f'{_ONE}, le="0.05"', _WINDOW)
                        + " / "
                        + per_second(f"{m.P_VALUE.name}_count", "category", _ONE, _WINDOW),
                        "at most 0.05",
                    ),
                ),
                lines(
                    "Drift",
                    "none",
                    "The alert fires above 0.3, with at least 100 images in a worker's window. If the change is "
                    "permanent, train again with recent normal images.",
                    Query(_drift("category", _ONE), "drift"),
                    runbook="FlawstreamDrift",
                    limit=DRIFT_LIMIT,
                    most=1,
                ),
                lines(
                    "Versions loaded",
                    "none",
                    "1 while any detector has the version loaded; shows when a promotion took effect.",
                    Query(f"max by (version) ({select(m.MODEL_INFO, _ONE)})", "{{version}}"),
                    most=1,
                    width=12,
                ),
                lines(
                    "Window",
                    IMAGES,
                    "Number of latest results behind drift and quantiles. Starts again at 0 with another version.",
                    Query(f"max by (category) ({select(m.WINDOW_IMAGES, _ONE)})", "images"),
                    limit=DRIFT_IMAGES,
                    width=12,
                ),
            ],
        ),
    ],
)
