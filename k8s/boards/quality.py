"""The board of whoever answers for the verdicts: each category's rate, scores, drift and model."""

from flawstream.telemetry import metrics as m
from k8s.boards.panels import IMAGES, IMAGES_PER_S, Board, Panel, Query, buckets, choice, lines, number
from k8s.boards.queries import counted, per_second, select

DRIFT_LIMIT = 0.3
"""As the alert has it."""
DRIFT_IMAGES = 100
"""So many images the alert asks for."""

_ONE = 'category="$category"'
_WINDOW = "30m"
"""Rates of rare things need more than a few scrapes."""


def _anomalous(matchers: str = "") -> str:
    """Give the share of results that are anomalous; 0 where there are results and none is."""
    comma = ", " if matchers else ""
    all_of_them = per_second(m.RESULTS, "category", matchers, _WINDOW)
    anomalous = per_second(m.RESULTS, "category", f'{matchers}{comma}verdict="anomalous"', _WINDOW)
    return f"({anomalous} or 0 * {all_of_them}) / {all_of_them}"


def _drift(by: str, matchers: str = "") -> str:
    return f"max by ({by}) ({select(m.DRIFT_DISTANCE, matchers)})"


def _share(width: int, title: str, query: Query) -> Panel:
    return lines(
        title,
        "percentunit",
        "Anomalous results of all, over half an hour. A step without a cause on the line is drift, or another model: "
        "look at the maps of some, then at the scores below.",
        query,
        width=width,
    )


BOARD = Board(
    uid="flawstream-quality",
    title="flawstream: quality",
    description="For each category: how many parts are judged anomalous, how scores lie, and whether they drift.",
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
                    "Distance of the latest p-values from uniform: 0 as calibrated. Above the line, scores are no more "
                    "what they were: light, focus, fixture, or many anomalous parts.",
                    Query(f"topk(10, {_drift('category')})", "{{category}}"),
                    runbook="FlawstreamDrift",
                    limit=DRIFT_LIMIT,
                    most=1,
                ),
                lines(
                    "Results",
                    IMAGES_PER_S,
                    "Results of each category. `other`: those past `metrics.max_categories`.",
                    Query(per_second(m.RESULTS, "category"), "{{category}}"),
                ),
            ],
        ),
        (
            "$category",
            [
                number(
                    "Model",
                    "none",
                    "Version that detectors have loaded. Two: a promotion is under way, or a detector could not load "
                    "it.",
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
                    "Share of the results within 24 hours. Compare it with what people on the line find.",
                    Query(_anomalous(_ONE).replace(f"[{_WINDOW}]", "[1d]"), "anomalous"),
                ),
                number(
                    "Drift now",
                    "none",
                    "Distance of the latest p-values from uniform; more than 0.3 is drift, once the window has 100 "
                    "images.",
                    Query(_drift("category", _ONE), "drift"),
                    runbook="FlawstreamDrift",
                    limit=DRIFT_LIMIT,
                ),
                number(
                    "Window",
                    IMAGES,
                    "Results from which drift and quantiles are taken. Below 100, do not read drift yet.",
                    Query(f"max by (category) ({select(m.WINDOW_IMAGES, _ONE)})", "window"),
                ),
                number(
                    "Threshold",
                    "none",
                    "A score above it is anomalous, nats per channel. It comes with the model's calibration.",
                    Query(f"max by (category) ({select(m.THRESHOLD, _ONE)})", "threshold"),
                ),
                lines(
                    "Scores and threshold",
                    "none",
                    "Quantiles of the latest scores, nats per channel, in the mean over workers. The median moves to "
                    "the threshold: drift. Only the highest does: more anomalous parts.",
                    Query(f"avg by (quantile) ({select(m.WINDOW_SCORE, _ONE)})", "quantile {{quantile}}"),
                    Query(f"max by (category) ({select(m.THRESHOLD, _ONE)})", "threshold"),
                    width=12,
                ),
                buckets(
                    "p-values",
                    "short",
                    "Results by p-value; the axis has the buckets' upper ends. Normal parts fill each tenth alike. A "
                    "heap at the bottom: anomalous parts or drift. At the top: lower than calibrated, drift too.",
                    Query(counted(f"{m.P_VALUE.name}_bucket", "le", _ONE), "{{le}}"),
                    width=12,
                ),
                _share(8, "Anomalous", Query(_anomalous(_ONE), "anomalous")),
                lines(
                    "p-value of 0.05 or less",
                    "percentunit",
                    "Share of results that only one in twenty normal parts would have; 5 % where all are normal.",
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
                    "The alert asks for more than 0.3 and 100 images in a worker's window. Teach the new state: train "
                    "again with recent normal images, if what changed is to stay.",
                    Query(_drift("category", _ONE), "drift"),
                    runbook="FlawstreamDrift",
                    limit=DRIFT_LIMIT,
                    most=1,
                ),
                lines(
                    "Versions loaded",
                    "none",
                    "1 while a version is loaded in some detector: when a promotion took effect.",
                    Query(f"max by (version) ({select(m.MODEL_INFO, _ONE)})", "{{version}}"),
                    most=1,
                    width=12,
                ),
                lines(
                    "Window",
                    IMAGES,
                    "Latest results that drift and quantiles are taken from. It begins anew with another version.",
                    Query(f"max by (category) ({select(m.WINDOW_IMAGES, _ONE)})", "images"),
                    limit=DRIFT_IMAGES,
                    width=12,
                ),
            ],
        ),
    ],
)
