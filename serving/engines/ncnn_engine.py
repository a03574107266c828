"""ncnn on a CPU: the fastest there in float32, for one category and for many. Extra `ncnn`, better with `openvino`.

Heads run in ncnn, image by image, so that a batch of many categories costs what a batch of one does. The backbone runs
in ncnn where it is mostly 3x3 convolutions, as a ResNet is, and else in OpenVINO if that is installed. Versions with a
proven int8 graph run in that, where the CPU has instructions for it.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from flawstream.array_normalisation import array_normaliser
from flawstream.compiled import CompiledModule, openvino_is_installed
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.int8 import Int8Flows
from flawstream.ncnn_graphs import NcnnGraph, backbone_graphs, flow_graphs, is_mostly_3x3, require_ncnn
from schemas.manifest import ModelManifest
from serving.engines.engine import Read, no_files
from serving.engines.int8_versions import Int8Version, detect_apart, load_int8

Grid = NDArray[np.float32]

_SHARES = 4
"""Of a batch, for each thread and scale: a core that others use as well holds nobody up for long."""


class NcnnEngine:
    """Runs in float32 what has no int8 graph, on as many threads as there are CPUs.

    Args:
        backbone: The frozen network.
        int8: Whether versions are judged in int8 that may be.

    Raises:
        ConfigError: ncnn is not installed, or cannot run the network and OpenVINO is not installed either.
    """

    copies = 3
    """Measured 1.6 for the default preset and 2.6 for `resnet18`: what Winograd's algorithm makes of 3x3 weights."""

    def __init__(self, backbone: Backbone, *, int8: bool = False) -> None:
        require_ncnn()
        self._int8 = int8
        self.spec = backbone.spec
        self._threads = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads, "ncnn")
        if openvino_is_installed() and not is_mostly_3x3(backbone):
            side = self.spec.input_size
            self._backbone: Callable[[NDArray[np.uint8]], list[Grid]] = CompiledModule(
                backbone, [(side, side, 3)], dtype=torch.uint8
            )
        else:
            self._backbone = _BackboneGraphs(backbone, self._pool, self._threads)

    def load(self, head: FastFlowHead, manifest: ModelManifest, read: Read = no_files) -> "_Head | Int8Version":
        """Fold a head, write it down as graphs and run them once."""
        if self._int8 and (version := load_int8(head, manifest, read)) is not None:
            return version
        loaded = _Head(FoldedHead(head), self._threads)
        features = [np.zeros((1, *shape), np.float32) for shape in self.spec.feature_shapes]
        loaded.judge_alone(features, self._pool)
        for scale, values in enumerate(features):
            loaded.judge(scale, values)
        return loaded

    def detect(
        self, images: NDArray[np.uint8], heads: Sequence[tuple["_Head | Int8Version", NDArray[np.int64]]]
    ) -> list[Grid]:
        """Run the backbone, then each head on its rows; see `Engine`."""
        return detect_apart(images, heads, self.spec, self._detect)

    def _detect(
        self, images: NDArray[np.uint8], heads: Sequence[tuple["_Head | Int8Flows", NDArray[np.int64]]]
    ) -> list[Grid]:
        features = self._backbone(np.ascontiguousarray(images))
        if len(images) == 1:
            (head, _), *_ = heads
            return head(features) if isinstance(head, Int8Flows) else head.judge_alone(features, self._pool)
        grids = [np.empty((len(images), side, side), np.float32) for side in self.spec.grid_sizes]
        share = -(-len(images) // (_SHARES * self._threads))

        def run(scale: int, head: "_Head", rows: NDArray[np.int64]) -> None:
            grids[scale][rows] = head.judge(scale, features[scale][rows])

        work = [
            (scale, head, rows[start : start + share])
            for scale in range(len(features))
            for head, rows in heads
            if isinstance(head, _Head)
            for start in range(0, len(rows), share)
        ]
        list(self._pool.map(run, *zip(*work, strict=True)))
        for head, rows in heads:
            if isinstance(head, Int8Flows):
                for whole, part in zip(grids, head([scale[rows] for scale in features]), strict=True):
                    whole[rows] = part
        return grids


class _BackboneGraphs:
    """A backbone in ncnn: images side by side on a thread each, or one after the other on all where they are fewer."""

    def __init__(self, backbone: Backbone, pool: Executor, threads: int) -> None:
        self._beside, self._alone = backbone_graphs(backbone, [1, threads])
        self._pool, self._threads = pool, threads

    def __call__(self, images: NDArray[np.uint8]) -> list[Grid]:
        """Map (B, S, S, 3) images to one (B, C_s, H_s, W_s) array per scale."""
        if len(images) < self._threads:
            found = [self._alone.of_pixels(image) for image in images]
        else:
            found = list(self._pool.map(self._beside.of_pixels, images))
        return [np.stack(scale) for scale in zip(*found, strict=True)]


class _Head:
    """A folded head: for each scale what normalises, and a graph on one thread.

    The scales of a lone image run side by side. Where that leaves one over, they run in turn on all threads,
    which takes graphs of their own.
    """

    def __init__(self, head: FoldedHead, threads: int) -> None:
        self._normalise = [array_normaliser(statistics) for statistics in head.statistics]
        one_is_left_over = threads > 1 and len(head.flows) % threads == 1
        graphs = [flow_graphs(flow, [1, threads] if one_is_left_over else [1]) for flow in head.flows]  # type: ignore[arg-type]
        self._graphs = [beside for beside, *_ in graphs]
        self._alone = [alone for _, *rest in graphs for alone in rest]

    def judge(self, scale: int, features: Grid) -> Grid:
        """Map one scale's (B, C, H, W) features to (B, H, W), on this thread."""
        return self._run(self._graphs[scale], scale, features)

    def judge_alone(self, features: Sequence[Grid], pool: Executor) -> list[Grid]:
        """Map one image's (1, C_s, H_s, W_s) features per scale to (1, H_s, W_s)."""
        if self._alone:
            return list(map(self._run, self._alone, range(len(features)), features))
        return list(pool.map(self.judge, range(len(features)), features))

    def _run(self, graph: NcnnGraph, scale: int, features: Grid) -> Grid:
        return np.stack([graph(image)[0] for image in self._normalise[scale](features)])
