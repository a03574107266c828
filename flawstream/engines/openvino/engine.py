"""OpenVINO on a CPU. Needs the extra `openvino`."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flawstream.engines.openvino.compile import CompiledGraph, CompiledModule
from flawstream.engines.openvino.head_graph import head_graph
from flawstream.engines.openvino.int8_graph import Int8Flows
from flawstream.engines.openvino.int8_versions import load_int8
from flawstream.engines.protocol import HeadRows, Read, ScoredBatch, no_files, run_heads, score_batch, weights_bytes
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.manifest import Arithmetic, ModelManifest

_COPIES = 4
"""Memory of a head over its float32 weights: measured 3.1 after a batch of 1, and 3.7 after one of 8."""


class OpenvinoEngine:
    """Computes versions without an int8 graph in float32.

    Args:
        backbone: The frozen network.
        int8: Whether to compute versions in int8 that passed the int8 trial.
        threads: CPU threads; 0: all.

    Raises:
        ConfigError: OpenVINO is not installed.
    """

    precision: Arithmetic = "float32"
    concurrent_batches = 1
    usable = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        int8: bool = False,
        threads: int = 0,
    ) -> None:
        self.spec = backbone.spec
        self._threads = threads
        self.trial_arithmetic: Arithmetic | None = "int8" if int8 else None
        form = PixelForm.of(self.spec)
        self._backbone = CompiledModule(backbone, [form.shape], dtype=getattr(torch, form.dtype), threads=threads)

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> "_Run | Int8Flows":
        """Fold a head, convert it to a graph, compile it and run it once."""
        if self.trial_arithmetic and (version := load_int8(head, manifest, read)) is not None:
            return version
        graph = head_graph(FoldedHead(head), self.spec.feature_shapes)
        compiled = CompiledGraph(graph, threads=self._threads)

        def run(features: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
            return compiled(*features)

        run([np.zeros((1, *shape), np.float32) for shape in self.spec.feature_shapes])
        return run

    def memory_of(self, head: FastFlowHead) -> int:
        """Estimate the memory of a head in bytes: weights, repacked weights and activations."""
        return _COPIES * weights_bytes(head)

    def warm_up(self) -> None:
        """Do nothing: `load` runs each head."""

    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        """Run the backbone, then each head on its rows; see `Engine`."""
        return score_batch(run_heads(self._backbone(images), heads, self.spec), heads)


_Run = Callable[[Sequence[NDArray[np.float32]]], list[NDArray[np.float32]]]
