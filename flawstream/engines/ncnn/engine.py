"""ncnn on a CPU: the fastest there in float32, for one category and for many. Extra `ncnn`, better with `openvino`.

Each image has a thread of its own through backbone and head, so that no core waits for another, and a batch of many
categories costs what a batch of one does. Heads run in ncnn. The backbone runs in ncnn where it is mostly 3x3
convolutions, as a ResNet is, and else in OpenVINO if that is installed. Versions with a proven int8 graph run in that,
where the CPU has instructions for it.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flawstream.engines.ncnn.graphs import NcnnGraph, backbone_graphs, flow_graphs, is_mostly_3x3, require_ncnn
from flawstream.engines.numpy_whitening import array_normaliser
from flawstream.engines.openvino.compile import ImageGraph, openvino_is_installed
from flawstream.engines.openvino.int8_graph import Int8Flows
from flawstream.engines.openvino.int8_versions import load_int8
from flawstream.engines.protocol import Read, empty_grids, fill_rows, no_files
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.manifest import Arithmetic, ModelManifest

Grid = NDArray[np.float32]


class NcnnEngine:
    """Runs in float32 what has no int8 graph, on as many threads as there are CPUs.

    Args:
        backbone: The frozen network.
        int8: Whether versions are judged in int8 that may be.
        threads: CPU threads; 0 takes all.

    Raises:
        ConfigError: ncnn is not installed, or cannot run the network and OpenVINO is not installed either.
    """

    precision: Arithmetic = "float32"
    concurrent_batches = 2  # the next one's images begin while the last of this one are judged
    copies = 3
    """Measured 1.6 for the default preset and 2.6 for `resnet18`: what Winograd's algorithm makes of 3x3 weights."""

    def __init__(self, backbone: Backbone, *, int8: bool = False, threads: int = 0) -> None:
        require_ncnn()
        self.int8 = int8
        self.spec = backbone.spec
        self._threads = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads, "ncnn")
        self._under_way, self._counting = 0, threading.Lock()
        if openvino_is_installed() and not is_mostly_3x3(backbone):
            form = PixelForm.of(self.spec)
            dtype = getattr(torch, form.dtype)
            self._backbone: _Backbone = ImageGraph(backbone, form.shape, dtype=dtype, threads=self._threads)
        else:
            self._backbone = _BackboneGraphs(backbone, self._threads)

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> "_Head | Int8Flows":
        """Fold a head, write it down as graphs and run them once."""
        if self.int8 and (version := load_int8(head, manifest, read)) is not None:
            return version
        loaded = _Head(FoldedHead(head), self._threads)
        features = [np.zeros(shape, np.float32) for shape in self.spec.feature_shapes]
        loaded.judge_alone(features, self._pool)
        for scale, values in enumerate(features):
            loaded.judge(scale, values)
        return loaded

    def detect(self, images: Pixels, heads: Sequence[tuple["_Head | Int8Flows", NDArray[np.int64]]]) -> list[Grid]:
        """Run backbone and head image by image, each on a thread of its own; see `Engine`."""
        with self._counting:
            self._under_way += 1
        try:
            return self._detect(np.ascontiguousarray(images), heads)
        finally:
            with self._counting:
                self._under_way -= 1

    def _detect(self, images: Pixels, heads: Sequence[tuple["_Head | Int8Flows", NDArray[np.int64]]]) -> list[Grid]:
        grids = empty_grids(len(images), self.spec)

        def judge(place: tuple[int, "_Head"]) -> None:
            row, head = place
            features = self._backbone.beside(images[row])
            fill_rows(grids, row, list(map(head.judge, range(len(features)), features)))

        places = [(row, head) for head, rows in heads if isinstance(head, _Head) for row in rows.tolist()]
        is_one_over = len(places) % self._threads == 1 and self._under_way == 1
        last = places.pop() if is_one_over else None
        for _ in self._pool.map(judge, places):  # raises what one of them raised
            pass
        if last is not None:
            row, head = last
            fill_rows(grids, row, head.judge_alone(self._backbone.alone(images[row]), self._pool))
        for flows, rows in heads:
            if isinstance(flows, Int8Flows):
                fill_rows(grids, rows, flows(self._features(images[rows])))
        return grids

    def _features(self, images: Pixels) -> list[Grid]:
        """Map (B, S, S, 3) images to one (B, C_s, H_s, W_s) array per scale."""
        if len(images) == 1 == self._under_way:
            return [scale[None] for scale in self._backbone.alone(images[0])]
        found = self._pool.map(self._backbone.beside, images)
        return [np.stack(scale) for scale in zip(*found, strict=True)]


class _Backbone(Protocol):
    """A backbone for one image at a time: (S, S, 3) to one (C_s, H_s, W_s) array per scale."""

    def alone(self, image: Pixels, /) -> list[Grid]:
        """Run it on all threads."""
        ...

    def beside(self, image: Pixels, /) -> list[Grid]:
        """Run it on one thread; as many as there are may do so at once."""
        ...


class _BackboneGraphs:
    """A backbone in ncnn."""

    def __init__(self, backbone: Backbone, threads: int) -> None:
        beside, alone = backbone_graphs(backbone, [1, threads])
        self.beside, self.alone = beside.of_pixels, alone.of_pixels


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
        """Map one scale's (C, H, W) features to (H, W), on this thread."""
        return self._run(self._graphs[scale], scale, features)

    def judge_alone(self, features: Sequence[Grid], pool: Executor) -> list[Grid]:
        """Map one (C_s, H_s, W_s) array of features per scale to one (H_s, W_s) grid, on all threads."""
        if self._alone:
            return list(map(self._run, self._alone, range(len(features)), features))
        return list(pool.map(self.judge, range(len(features)), features))

    def _run(self, graph: NcnnGraph, scale: int, features: Grid) -> Grid:
        return graph(self._normalise[scale](features[None])[0])[0]
