"""An HTML report that one can send: per category the metrics, the scores, and images beside their heatmaps."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray

from flawstream.images import decode_image
from flawstream.maps import decode_map, encode_jpeg, paint
from schemas.manifest import Metrics
from schemas.messages import AnomalyMap
from schemas.settings import LimitSettings

_SHOWN = 6
_BINS = 40
_LOWEST, _HIGHEST = 1e-3, 1e30  # the histogram's axis is logarithmic and ends somewhere
_HEATMAP_WEIGHT = 0.45
_LIMITS = LimitSettings(max_pixels=1 << 40, max_aspect=1e9)
"""None: what is shown was judged, under the limits that were set then."""


@dataclass(frozen=True, slots=True)
class JudgedImage:
    """One test image with what was said of it.

    Attributes:
        path: Where it lies.
        category: Whose model judged it.
        defect: The label, `good` for none.
        anomalous: The label, reduced.
        score: Nats per channel.
        threshold: `score` above it is anomalous.
        map: The anomaly map; encoded, since a report of thousands of images shows few of them.
    """

    path: Path
    category: str
    defect: str
    anomalous: bool
    score: float
    threshold: float
    map: AnomalyMap

    @property
    def is_wrong(self) -> bool:
        """Tell whether verdict and label differ."""
        return (self.score > self.threshold) != self.anomalous


def write_report(path: Path, title: str, judged: Sequence[JudgedImage], metrics: Mapping[str, Metrics]) -> None:
    """Write the report as one file without references to others.

    Args:
        path: The file; its folder is made.
        title: Its heading.
        judged: All judged images.
        metrics: Per category.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    sections = [
        _section(name, found, [one for one in judged if one.category == name]) for name, found in metrics.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment.get_template("report.html.j2").render(title=title, sections=sections)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # a file's name can be any bytes


def overlay(image: JudgedImage, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay the heatmap over the image; `flawstream.maps.paint` says what the colours mean."""
    heat = paint(decode_map(image.map), image.threshold)
    return np.asarray(cv2.addWeighted(heat, _HEATMAP_WEIGHT, pixels, 1 - _HEATMAP_WEIGHT, 0), dtype=np.uint8)


def _section(name: str, metrics: Metrics, judged: list[JudgedImage]) -> dict[str, Any]:
    ranked = sorted(judged, key=lambda one: one.score)
    missed = [one for one in ranked if one.is_wrong and one.anomalous]
    alarms = [one for one in reversed(ranked) if one.is_wrong and not one.anomalous]
    groups = {
        "Worst: the highest scores": ranked[::-1][:_SHOWN],
        "Best: the lowest scores": ranked[:_SHOWN],
        f"Missed defects: {len(missed)} in all": missed[:_SHOWN],
        f"False alarms: {len(alarms)} in all": alarms[:_SHOWN],
    }
    return {
        "name": name,
        "metrics": metrics,
        "threshold": judged[0].threshold if judged else 0.0,
        "histogram": _histogram(judged),
        "groups": {heading: [_card(one) for one in images] for heading, images in groups.items() if images},
    }


def _card(image: JudgedImage) -> dict[str, Any]:
    pixels = decode_image(image.path.read_bytes(), image.map.shape[0], _LIMITS).pixels
    return {
        "name": image.path.name,
        "label": image.defect,
        "score": image.score,
        "is_wrong": image.is_wrong,
        "picture": base64.b64encode(encode_jpeg(pixels)).decode(),
        "heatmap": base64.b64encode(encode_jpeg(overlay(image, pixels))).decode(),
    }


def _histogram(judged: Sequence[JudgedImage]) -> dict[str, Any]:
    """Count scores in bins of equal width on a logarithmic axis."""
    if not judged:
        return {}
    threshold = max(judged[0].threshold, _LOWEST)
    scores = np.clip([one.score for one in judged], _LOWEST, _HIGHEST)
    labels = np.array([one.anomalous for one in judged])
    low, high = min(float(scores.min()), threshold) * 0.98, max(float(scores.max()), threshold) * 1.02
    edges = np.geomspace(low, high, _BINS + 1)
    normal, _ = np.histogram(scores[~labels], edges)
    anomalous, _ = np.histogram(scores[labels], edges)
    tallest = max(int(normal.max(initial=0)), int(anomalous.max(initial=0)), 1)
    return {
        "bars": [
            {"x": 100 * k / _BINS, "normal": 100 * int(n) / tallest, "anomalous": 100 * int(a) / tallest}
            for k, (n, a) in enumerate(zip(normal, anomalous, strict=True))
        ],
        "width": 100 / _BINS,
        "threshold_x": 100 * math.log(threshold / low) / math.log(high / low),
        "low": low,
        "high": high,
        "tallest": tallest,
    }
