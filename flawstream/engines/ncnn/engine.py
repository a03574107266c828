"""ncnn on a CPU: the fastest engine there in float32. Needs the extra `ncnn`, faster with `openvino`.

Each image runs through backbone and head on one thread, so that cores do not wait for one another, and a batch of many
categories is as fast as a batch of one. Heads run in ncnn. The backbone runs in ncnn if it is mostly 3x3 convolutions
in float32, as a ResNet is, otherwise in OpenVINO if that is installed; an int8 backbone needs OpenVINO. Versions that
passed the int8 trial run their flows in int8, if the CPU has instructions for it.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from flawstream.engines.ncnn.graphs import NcnnGraph, backbone_graphs, flow_graphs, is_mostly_3x3, require_ncnn
from flawstream.engines.numpy_whitening import array_normaliser
from flawstream.engines.openvino.compile import ImageGraph, openvino_is_installed
from flawstream.engines.openvino.int8_graph import Int8Flows
from flawstream.engines.openvino.int8_versions import load_int8
from flawstream.engines.protocol import (
    Float32Array,
    HeadRows,
    Read,
    ScoredBatch,
    empty_grids,
    fill_rows,
    no_files,
    score_batch,
    weights_bytes,
)
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.errors import ConfigError
from schemas.manifest import Arithmetic, ModelManifest

_COPIES = 3
"""Memory of a head over its float32 weights: measured 1.6 for the default preset and 2.6 for `resnet18`."""


class NcnnEngine:
    """Computes versions without an int8 graph in float32.

    Args:
        backbone: The frozen network.
        int8: Whether to compute versions in int8 that passed the int8 trial.
        threads: CPU threads; 0: all.

    Raises:
        ConfigError: ncnn is not installed, or cannot run the backbone and OpenVINO is not installed either.
    """

    precision: Arithmetic = "float32"
    concurrent_batches = 2  # images of the next batch use cores that are idle at the end of this one
    usable = True

    def __init__(self, backbone: Backbone, *, int8: bool = False, threads: int = 0) -> None:
        require_ncnn()
        self.trial_arithmetic: Arithmetic | None = "int8" if int8 else None
        self.spec = backbone.spec
        self._threads = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads, "ncnn")
        self._batches, self._batches_lock = 0, threading.Lock()
        is_int8 = backbone.spec.arithmetic == "int8"
        if is_int8 and not openvino_is_installed():
            raise ConfigError(
                "detector.engine=ncnn runs an int8 backbone with OpenVINO, which is not installed; "
                "pip install 'flawstream[openvino]', or train with model.arithmetic=float32"
            )
        if openvino_is_installed() and (is_int8 or not is_mostly_3x3(backbone)):
            form = PixelForm.of(self.spec)
            dtype = getattr(torch, form.dtype)
            self._backbone: _Backbone = ImageGraph(backbone, form.shape, dtype=dtype, threads=self._threads)
        else:
            self._backbone = _BackboneGraphs(backbone, self._threads)

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> "_Head | Int8Flows":
        """Fold a head, convert it to ncnn graphs and run them once."""
        if self.trial_arithmetic and (version := load_int8(head, manifest, read)) is not None:
            return version
        loaded = _Head(FoldedHead(head), self._threads)
        features = [np.zeros(shape, np.float32) for shape in self.spec.feature_shapes]
        loaded.run_on_all_threads(features, self._pool)
        for scale, values in enumerate(features):
            loaded.run_on_one_thread(scale, values)
        return loaded

    def memory_of(self, head: FastFlowHead) -> int:
        """Estimate the memory of a head in bytes, with its 3x3 weights in Winograd's form too."""
        return _COPIES * weights_bytes(head)

    def warm_up(self) -> None:
        """Do nothing: `load` runs each head."""

    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        """Run backbone and head, each image on one thread; see `Engine`."""
        with self._batches_lock:
            self._batches += 1
        try:
            return score_batch(self._grids(np.ascontiguousarray(images), heads), heads)
        finally:
            with self._batches_lock:
                self._batches -= 1

    def _grids(self, images: Pixels, heads: Sequence[HeadRows]) -> list[Float32Array]:
        grids = empty_grids(len(images), self.spec)

        def detect_image(task: tuple[int, "_Head"]) -> None:
            row, head = task
            features = self._backbone.run_on_one_thread(images[row])
            fill_rows(grids, row, list(map(head.run_on_one_thread, range(len(features)), features)))

        tasks = [(row, head) for head, rows, _ in heads if isinstance(head, _Head) for row in rows.tolist()]
        one_left_over = len(tasks) % self._threads == 1 and self._batches == 1
        last = tasks.pop() if one_left_over else None
        for _ in self._pool.map(detect_image, tasks):  # iterated to raise the tasks' exceptions
            pass
        if last is not None:
            row, head = last
            features = self._backbone.run_on_all_threads(images[row])
            fill_rows(grids, row, head.run_on_all_threads(features, self._pool))
        for flows, rows, _ in heads:
            if isinstance(flows, Int8Flows):
                fill_rows(grids, rows, flows(self._features(images[rows])))
        return grids

    def _features(self, images: Pixels) -> list[Float32Array]:
        """Map (B, S, S, 3) images to one (B, C_s, H_s, W_s) array per scale."""
        if len(images) == 1 == self._batches:
            return [scale[None] for scale in self._backbone.run_on_all_threads(images[0])]
        features = self._pool.map(self._backbone.run_on_one_thread, images)
        return [np.stack(scale) for scale in zip(*features, strict=True)]


class _Backbone(Protocol):
    """A backbone at batch size 1: maps (S, S, 3) to one (C_s, H_s, W_s) array per scale."""

    def run_on_all_threads(self, image: Pixels, /) -> list[Float32Array]:
        """Run with all threads."""
        ...

    def run_on_one_thread(self, image: Pixels, /) -> list[Float32Array]:
        """Run on one thread; may be called by all threads at once."""
        ...


class _BackboneGraphs:
    """A backbone in ncnn."""

    def __init__(self, backbone: Backbone, threads: int) -> None:
        on_one_thread, on_all_threads = backbone_graphs(backbone, [1, threads])
        self.run_on_one_thread, self.run_on_all_threads = on_one_thread.run_on_pixels, on_all_threads.run_on_pixels


class _Head:
    """A folded head: the normalisation and the ncnn graph of each scale.

    At batch size 1 the scales run in parallel, one thread each. If that leaves one scale over, the scales run one after
    another with all threads, in separate graphs.
    """

    def __init__(self, head: FoldedHead, threads: int) -> None:
        self._normalise = [array_normaliser(statistics) for statistics in head.statistics]
        one_left_over = threads > 1 and len(head.flows) % threads == 1
        graphs = [flow_graphs(flow, [1, threads] if one_left_over else [1]) for flow in head.flows]  # type: ignore[arg-type]
        self._on_one_thread = [graph for graph, *_ in graphs]
        self._on_all_threads = [graph for _, *rest in graphs for graph in rest]

    def run_on_one_thread(self, scale: int, features: Float32Array) -> Float32Array:
        """Map one scale's (C, H, W) features to an (H, W) grid."""
        return self._run(self._on_one_thread[scale], scale, features)

    def run_on_all_threads(self, features: Sequence[Float32Array], pool: Executor) -> list[Float32Array]:
        """Map one (C_s, H_s, W_s) array of features per scale to one (H_s, W_s) grid."""
        if self._on_all_threads:
            return list(map(self._run, self._on_all_threads, range(len(features)), features))
        return list(pool.map(self.run_on_one_thread, range(len(features)), features))

    def _run(self, graph: NcnnGraph, scale: int, features: Float32Array) -> Float32Array:
        return graph(self._normalise[scale](features[None])[0])[0]
