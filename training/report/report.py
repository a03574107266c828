"""An HTML report that one can send: per category the metrics, the curves, and images beside their heatmaps."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray

from flawstream.imaging.decode import decode_image
from flawstream.imaging.maps import decode_map, encode_jpeg, paint
from flawstream.imaging.pixels import PixelForm
from schemas.manifest import Metrics
from schemas.messages import AnomalyMap
from schemas.settings import LimitSettings
from training.report import plots
from training.report.plots import plot_scores
from training.steps.evaluate import METRIC_NAMES, RATES, read_mask, spread

_SHOWN = 8
_HEATMAP_WEIGHT = 0.45
_OUTLINE_PX = 2
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
        mask: Where the defect is, in the data set's own file.
    """

    path: Path
    category: str
    defect: str
    anomalous: bool
    score: float
    threshold: float
    map: AnomalyMap
    mask: Path | None = None

    @property
    def is_alarm(self) -> bool:
        """Tell whether the verdict is anomalous; a score that is no number is."""
        return not self.score <= self.threshold

    @property
    def is_wrong(self) -> bool:
        """Tell whether verdict and label differ."""
        return self.is_alarm != self.anomalous


def write_report(
    path: Path,
    title: str,
    judged: Sequence[JudgedImage],
    metrics: Mapping[str, Metrics],
    versions: Mapping[str, Mapping[str, Metrics]] | None = None,
) -> None:
    """Write the report as one file without references to others.

    Args:
        path: The file; its folder is made.
        title: Its heading.
        judged: All judged images.
        metrics: Per category.
        versions: Per category the metrics by model version, that of `metrics` the first; several are compared.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sections = [
        _section(name, found, [one for one in judged if one.category == name], (versions or {}).get(name, {}))
        for name, found in metrics.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment.get_template("report.html.j2").render(
        title=title, sections=sections, plots=plots, names=METRIC_NAMES, rates=RATES, version=version("flawstream")
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # a file's name can be any bytes


def overlay(image: JudgedImage, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay the heatmap over the image; `flawstream.imaging.maps.paint` says what the colours mean.

    Args:
        image: Its map.
        pixels: (S, S, 3) uint8 RGB.

    Returns:
        The same shape. White lines bound the defect where it has a mask.

    Raises:
        DatasetError: The mask cannot be read.
    """
    heat = paint(decode_map(image.map), image.threshold)
    mixed = np.asarray(cv2.addWeighted(heat, _HEATMAP_WEIGHT, pixels, 1 - _HEATMAP_WEIGHT, 0), dtype=np.uint8)
    if image.mask is not None:
        mask = read_mask(image.mask, pixels.shape[0]).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(mixed, contours, -1, (0, 0, 0), 2 * _OUTLINE_PX)  # else white is lost on a bright part
        cv2.drawContours(mixed, contours, -1, (255, 255, 255), _OUTLINE_PX)
    return mixed


def _section(name: str, metrics: Metrics, judged: list[JudgedImage], versions: Mapping[str, Metrics]) -> dict[str, Any]:
    ranked = sorted(judged, key=lambda one: one.score if math.isfinite(one.score) else math.inf)
    missed = [one for one in ranked if one.is_wrong and one.anomalous]
    alarms = [one for one in reversed(ranked) if one.is_wrong and not one.anomalous]
    groups = {
        f"Missed defects: {len(missed)} in all": missed,
        f"False alarms: {len(alarms)} in all": alarms,
        "Worst: the highest scores": ranked[::-1],
        "Best: the lowest scores": ranked,
    }
    threshold = judged[0].threshold if judged else None
    return {
        "name": name,
        "metrics": metrics,
        "threshold": threshold,
        "plots": plot_scores(
            np.array([one.score for one in judged], dtype=np.float64),
            np.array([one.anomalous for one in judged], dtype=bool),
            threshold or 0.0,
        ),
        "versions": versions,
        "spread": spread(list(versions.values())),
        "groups": {heading: [_card(one) for one in images[:_SHOWN]] for heading, images in groups.items() if images},
        "has_masks": any(one.mask is not None for one in judged),
    }


def _card(image: JudgedImage) -> dict[str, Any]:
    shown = decode_image(image.path.read_bytes(), PixelForm(image.map.shape[0]), _LIMITS)
    pixels = np.asarray(shown.pixels, np.uint8)
    return {
        "name": image.path.name,
        "label": image.defect,
        "score": image.score,
        "is_wrong": image.is_wrong,
        "picture": base64.b64encode(encode_jpeg(pixels)).decode(),
        "heatmap": base64.b64encode(encode_jpeg(overlay(image, pixels))).decode(),
    }
