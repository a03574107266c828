"""A self-contained HTML report: metrics, curves and heatmaps of images, per category."""

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
from schemas.manifest import EvaluationMetrics
from schemas.messages import AnomalyMap
from schemas.settings import LimitSettings
from training.datasets.storage import read_file
from training.report import plots
from training.report.plots import plot_scores
from training.steps.evaluate import METRIC_NAMES, RATES, read_mask, spread

_MAX_CARDS = 8
_HEATMAP_WEIGHT = 0.45
_OUTLINE_PX = 2
_LIMITS = LimitSettings(max_pixels=1 << 40, max_aspect=1e9)
"""No limits: the images were already decoded under the configured limits."""


@dataclass(frozen=True, slots=True)
class JudgedImage:
    """One test image with its detection.

    Attributes:
        path: The image file.
        category: The category.
        defect: The labelled kind of defect; `good` if normal.
        anomalous: Whether it is labelled anomalous.
        score: Image score, nats per channel.
        threshold: The threshold of image scores.
        map: The anomaly map; encoded to save memory, as few of the images are shown.
        mask: The mask file.
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
        """Check whether the verdict is anomalous; NaN is."""
        return not self.score <= self.threshold

    @property
    def is_wrong(self) -> bool:
        """Check whether verdict and label differ."""
        return self.is_alarm != self.anomalous


def write_report(
    path: Path,
    title: str,
    judged: Sequence[JudgedImage],
    metrics: Mapping[str, EvaluationMetrics],
    versions: Mapping[str, Mapping[str, EvaluationMetrics]] | None = None,
) -> None:
    """Write the report as one self-contained file.

    Args:
        path: The file; its folder is created.
        title: The heading.
        judged: All test images.
        metrics: Metrics by category.
        versions: By category the metrics of several model versions to compare, that of `metrics` first.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sections = [
        _section(
            name, of_category, [image for image in judged if image.category == name], (versions or {}).get(name, {})
        )
        for name, of_category in metrics.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment.get_template("report.html.j2").render(
        title=title, sections=sections, plots=plots, names=METRIC_NAMES, rates=RATES, version=version("flawstream")
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names can be any bytes


def overlay(image: JudgedImage, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Blend the heatmap over the image; `flawstream.imaging.maps.paint` defines the colours.

    Args:
        image: The image with its map.
        pixels: (S, S, 3) uint8 RGB.

    Returns:
        The same shape, with the outline of the mask in white.

    Raises:
        DatasetError: The mask cannot be read.
    """
    heat = paint(decode_map(image.map), image.threshold)
    mixed = np.asarray(cv2.addWeighted(heat, _HEATMAP_WEIGHT, pixels, 1 - _HEATMAP_WEIGHT, 0), dtype=np.uint8)
    if image.mask is not None:
        mask = read_mask(image.mask, pixels.shape[0]).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(
            mixed, contours, -1, (0, 0, 0), 2 * _OUTLINE_PX
        )  # black border: white alone is invisible on bright parts
        cv2.drawContours(mixed, contours, -1, (255, 255, 255), _OUTLINE_PX)
    return mixed


def _section(
    name: str, metrics: EvaluationMetrics, judged: list[JudgedImage], versions: Mapping[str, EvaluationMetrics]
) -> dict[str, Any]:
    ranked = sorted(judged, key=lambda image: image.score if math.isfinite(image.score) else math.inf)
    missed = [image for image in ranked if image.is_wrong and image.anomalous]
    alarms = [image for image in reversed(ranked) if image.is_wrong and not image.anomalous]
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
            np.array([image.score for image in judged], dtype=np.float64),
            np.array([image.anomalous for image in judged], dtype=bool),
            threshold or 0.0,
        ),
        "versions": versions,
        "spread": spread(list(versions.values())),
        "groups": {
            heading: [_card(image) for image in images[:_MAX_CARDS]] for heading, images in groups.items() if images
        },
        "has_masks": any(image.mask is not None for image in judged),
    }


def _card(image: JudgedImage) -> dict[str, Any]:
    decoded = decode_image(read_file(image.path), PixelForm(image.map.shape[0]), _LIMITS)
    pixels = np.asarray(decoded.pixels, np.uint8)
    return {
        "name": image.path.name,
        "label": image.defect,
        "score": image.score,
        "is_wrong": image.is_wrong,
        "picture": base64.b64encode(encode_jpeg(pixels)).decode(),
        "heatmap": base64.b64encode(encode_jpeg(overlay(image, pixels))).decode(),
    }
