"""An int8 graph of a trained version, and the proof that it scores as float32 does. No Ray in here.

Ranges are taken from normal images that trained the flow; what is compared are held-out images, and test images where
there are some. A graph that does harm is not kept, and the manifest says what was found (docs/decisions/0005).

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from flawstream.engines.openvino.int8_graph import Int8Flows, Int8Graph, int8_pays, write_int8
from flawstream.engines.openvino.quantise import fold_batch_norms, quantise
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.score import image_scores
from flawstream.imaging.pixels import Pixels
from schemas.manifest import Int8Trial
from training.datasets.samples import Sample
from training.steps.features import FeatureExtractor

LEAST_RANK = 0.99
"""Of normal images' scores in int8 and in float32."""
MOST_ALARMS = 0.01
"""By so much may the share of normal images above the threshold differ; one image may in any case."""
MOST_AUROC_LOSS = 0.003

_FEWEST = 20
"""Held-out normal images; fewer prove nothing."""
_RANGE_IMAGES = 32
_PROOF_IMAGES = 256
"""At most so many held-out images are compared, and as many test images of each class."""

_T = TypeVar("_T")
Scope = Literal["flows", "version"]
Judge = Callable[[Pixels, Sequence[NDArray[np.float32]]], list[NDArray[np.float32]]]
"""(B, S, S, 3) images and their (B, C_s, H_s, W_s) features per scale, to one (B, H_s, W_s) grid per scale."""


@dataclass(frozen=True, slots=True)
class Material:
    """What int8 is tried on.

    Attributes:
        ranges: Normal images that ranges are taken from.
        held_out: Other normal images.
        test: Test images; may be none.
        top_fraction: How image scores are taken from maps.
        threshold: A score above it is anomalous.
    """

    ranges: Sequence[Path]
    held_out: Sequence[Path]
    test: Sequence[Sample]
    top_fraction: float
    threshold: float


def try_int8(
    extractor: FeatureExtractor, head: FastFlowHead, material: Material
) -> tuple[tuple[Int8Trial, ...], Mapping[str, bytes]]:
    """Make int8 graphs, the furthest-reaching first, until one does no harm.

    The whole version is tried where its features are taken as they are or normalised by image: white features enlarge
    what a quantised backbone loses beyond any use (docs/decisions/0005).

    Args:
        extractor: The backbone.
        head: The trained head.
        material: The images.

    Returns:
        What was found, and the files of the graph that is kept, if one is. Nothing where there are too few images or
        this CPU has no use for int8.

    Raises:
        DatasetError: An image cannot be read.
    """
    if not int8_pays() or len(material.held_out) < _FEWEST:
        return (), {}
    scopes: list[Scope] = ["flows"]
    convolutional = not extractor.spec.blocks
    if convolutional and all(isinstance(one, nn.LayerNorm | nn.Identity) for one in head.statistics):
        scopes.insert(0, "version")
    trials: list[Int8Trial] = []
    ranges = _spread(material.ranges, _RANGE_IMAGES)
    for scope in scopes:
        if scope == "version":
            files = write_version(extractor.backbone, head, extractor.pixels(ranges))
            graph = Int8Graph(files, extractor.threads)
            judge: Judge = lambda images, _, graph=graph: graph(images)  # type: ignore[misc]  # noqa: E731
        else:
            files = write_flows(head, _all_features(extractor, ranges))
            flows = Int8Flows(head, files, extractor.threads)
            judge = lambda _, features, flows=flows: flows(features)  # type: ignore[misc]  # noqa: E731
        trials.append(_compare(scope, extractor, head, judge, material))
        if trials[-1].kept:
            return tuple(trials), files
    return tuple(trials), {}


def write_flows(head: FastFlowHead, features: list[Tensor]) -> dict[str, bytes]:
    """Write the flows of a head as an int8 graph, from normalised features to grids.

    Args:
        head: Trained; left as it is.
        features: One (B, C_s, H_s, W_s) tensor per scale, which ranges are taken from.

    Returns:
        The files by name.
    """
    flows = _Flows(FoldedHead(head, by_index=True))
    with torch.inference_mode():
        normalised = [statistics(scale) for statistics, scale in zip(flows.head.statistics, features, strict=True)]
    quantise(flows, lambda: flows(*normalised), _is_spatial_or_dense)
    return write_int8(flows, [tuple(scale.shape[1:]) for scale in features], torch.float32)


def write_version(backbone: Backbone, head: FastFlowHead, images: Pixels) -> dict[str, bytes]:
    """Write a backbone and a head as one int8 graph, from pixels to grids.

    Args:
        backbone: Left as it is, as is the head.
        head: Trained.
        images: (B, S, S, 3), which ranges are taken from.

    Returns:
        The files by name.
    """
    whole = _Version(copy.deepcopy(backbone).cpu(), FoldedHead(head, by_index=True))
    pixels = torch.from_numpy(images)
    fold_batch_norms(whole.backbone, lambda: whole.backbone(pixels[:1]))
    quantise(whole, lambda: whole(pixels), _is_spatial_or_dense)
    return write_int8(whole, [images.shape[1:]], pixels.dtype)


def _is_spatial_or_dense(convolution: nn.Conv2d) -> bool:
    """Choose all but the first of a network, which sees pixels, and those of a channel each: little work, much loss."""
    return convolution.groups == 1 and convolution.in_channels > 3  # noqa: PLR2004 - red, green, blue


class _Flows(nn.Module):
    """Normalised features in, anomaly grids out."""

    def __init__(self, head: FoldedHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, *normalised: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.head.score(list(normalised)))


class _Version(nn.Module):
    """Pixels in, anomaly grids out, and behind them the features, where the graph can be cut."""

    def __init__(self, backbone: Backbone, head: FoldedHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images)
        return (*self.head(features), *features)


def _all_features(extractor: FeatureExtractor, paths: Sequence[Path]) -> list[Tensor]:
    batches = [features for _, features in extractor.batches(paths)]
    return [torch.cat([scale.cpu() for scale in scales]) for scales in zip(*batches, strict=True)]


def _compare(
    scope: Scope, extractor: FeatureExtractor, head: FastFlowHead, judge: Judge, material: Material
) -> Int8Trial:
    run = extractor.compile_head(head)

    def scores(paths: Sequence[Path]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Score images in int8 and in float32."""
        pairs = list(_pairs(extractor, run, judge, paths, material.top_fraction))
        return np.concatenate([int8 for int8, _ in pairs]), np.concatenate([exact for _, exact in pairs])

    int8, exact = scores(_spread(material.held_out, _PROOF_IMAGES))
    rank = float(spearmanr(int8, exact).statistic)
    alarms, alarms_float32 = (float((values > material.threshold).mean()) for values in (int8, exact))
    harmless = (
        np.isfinite(int8).all()
        and rank >= LEAST_RANK
        and abs(alarms - alarms_float32) <= max(MOST_ALARMS, 1 / len(exact) + 1e-9)
    )
    auroc: tuple[float, float] | tuple[None, None] = (None, None)
    chosen = [
        sample
        for anomalous in (False, True)
        for sample in _spread([one for one in material.test if one.anomalous is anomalous], _PROOF_IMAGES)
    ]
    labels = np.array([sample.anomalous for sample in chosen], bool)
    if labels.any() and not labels.all():
        int8_test, exact_test = scores([sample.path for sample in chosen])
        finite = bool(np.isfinite(int8_test).all() and np.isfinite(exact_test).all())
        if finite:
            auroc = float(roc_auc_score(labels, int8_test)), float(roc_auc_score(labels, exact_test))
            harmless = harmless and auroc[1] - auroc[0] <= MOST_AUROC_LOSS
        harmless = harmless and finite
    return Int8Trial(
        scope=scope,
        kept=bool(harmless),
        normal_images=len(exact),
        rank_correlation=rank,
        alarms=alarms,
        alarms_float32=alarms_float32,
        image_auroc=auroc[0],
        image_auroc_float32=auroc[1],
    )


def _pairs(
    extractor: FeatureExtractor,
    run: Callable[[list[Tensor]], list[Tensor]],
    judge: Judge,
    paths: Sequence[Path],
    top_fraction: float,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    for images, features in extractor.batches(paths):
        pixels = np.stack([image.pixels for image in images])
        arrays = [scale.cpu().numpy() for scale in features]
        grids = [torch.from_numpy(grid) for grid in judge(pixels, arrays)]
        int8, exact = (image_scores(found, top_fraction).double().numpy() for found in (grids, run(features)))
        yield int8, exact


def _spread(items: Sequence[_T], most: int) -> list[_T]:
    """Take so many of a sequence, from all over it."""
    if len(items) <= most:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]
