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
from flawstream.imaging.maps import decode_map, encode_jpeg, encode_map, paint, published_grid
from flawstream.imaging.pixels import PixelForm
from schemas.manifest import EvaluationMetrics
from schemas.messages import AnomalyMap, MapCodec
from schemas.settings import BitDepth, LimitSettings
from training.datasets.masks import read_masks
from training.datasets.samples import Sample
from training.datasets.storage import read_file
from training.report import plots
from training.report.plots import plot_losses, plot_scores
from training.steps.evaluate import METRIC_NAMES, RATES, ScoredImage, spread

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
        masks: The files of its masks.
        bits: By how many bits it was read, if its file has 16.
    """

    path: Path
    category: str
    defect: str
    anomalous: bool
    score: float
    threshold: float
    map: AnomalyMap
    masks: Sequence[Path] = ()
    bits: BitDepth = 16

    @property
    def is_alarm(self) -> bool:
        """Check whether the verdict is anomalous; NaN is."""
        return not self.score <= self.threshold

    @property
    def is_wrong(self) -> bool:
        """Check whether verdict and label differ."""
        return self.is_alarm != self.anomalous


@dataclass(frozen=True, slots=True)
class TrainingCourse:
    """What the report of a new version shows of its training.

    Attributes:
        losses: Mean loss of each epoch, nats per value summed over the scales.
        held_out: Normal images that did not train it, and set its thresholds.
    """

    losses: Sequence[float]
    held_out: Sequence[JudgedImage]


def judge(category: str, sample: Sample, image: ScoredImage, threshold: float) -> JudgedImage:
    """Judge a scored image by a threshold of image scores."""
    half = [published_grid(grid) for grid in image.grids]
    return JudgedImage(
        path=image.path,
        category=category,
        defect=sample.defect,
        anomalous=sample.anomalous,
        score=image.score,
        threshold=threshold,
        map=encode_map(half, (image.side, image.side), MapCodec.GRID_F16, threshold),
        masks=sample.masks,
        bits=image.bits,
    )


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
    sections = [
        _section(
            name, of_category, [image for image in judged if image.category == name], (versions or {}).get(name, {})
        )
        for name, of_category in metrics.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_render(title, sections))


def training_report(
    model: str, course: TrainingCourse, judged: Sequence[JudgedImage], metrics: EvaluationMetrics
) -> bytes:
    """Make the report of a version that was just trained: one self-contained HTML file.

    Args:
        model: The version, as `category@version`.
        course: Its training.
        judged: The test images; may be empty.
        metrics: Metrics on them.
    """
    section = _section(model, metrics, list(judged), {})
    ranked = sorted(course.held_out, key=_rank, reverse=True)
    scores = np.array([image.score for image in ranked], dtype=np.float64)
    histogram = plot_scores(scores, np.zeros(len(ranked), dtype=bool), ranked[0].threshold if ranked else 0.0)
    section["course"] = {
        "images": len(ranked),
        "plots": [plot for plot in (plot_losses(course.losses), *histogram) if plot is not None],
        "cards": [_card(image) for image in ranked[:_MAX_CARDS]],
    }
    return _render(f"flawstream: training of {model}", [section])


def _render(title: str, sections: Sequence[Mapping[str, Any]]) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(
        title=title, sections=sections, plots=plots, names=METRIC_NAMES, rates=RATES, version=version("flawstream")
    )
    return page.encode("utf-8", errors="backslashreplace")  # file names can be any bytes


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
    if image.masks:
        mask = read_masks(image.masks, pixels.shape[0]).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(
            mixed, contours, -1, (0, 0, 0), 2 * _OUTLINE_PX
        )  # black border: white alone is invisible on bright parts
        cv2.drawContours(mixed, contours, -1, (255, 255, 255), _OUTLINE_PX)
    return mixed


def _section(
    name: str, metrics: EvaluationMetrics, judged: list[JudgedImage], versions: Mapping[str, EvaluationMetrics]
) -> dict[str, Any]:
    ranked = sorted(judged, key=_rank)
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
        "has_masks": any(image.masks for image in judged),
        "course": None,
    }


def _rank(image: JudgedImage) -> float:
    return image.score if math.isfinite(image.score) else math.inf


def _card(image: JudgedImage) -> dict[str, Any]:
    decoded = decode_image(read_file(image.path), PixelForm(image.map.shape[0], bits=image.bits), _LIMITS)
    pixels = np.asarray(decoded.pixels, np.uint8)
    return {
        "name": image.path.name,
        "label": image.defect,
        "score": image.score,
        "is_wrong": image.is_wrong,
        "picture": base64.b64encode(encode_jpeg(pixels)).decode(),
        "heatmap": base64.b64encode(encode_jpeg(overlay(image, pixels))).decode(),
    }
