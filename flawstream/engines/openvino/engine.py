"""OpenVINO on a CPU. Needs the extra `openvino`."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from flawstream.engines.openvino.compile import CompiledModule
from flawstream.engines.openvino.int8_graph import Int8Flows
from flawstream.engines.openvino.int8_versions import load_int8
from flawstream.engines.protocol import Read, no_files, run_heads
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.manifest import Arithmetic, ModelManifest


class OpenvinoEngine:
    """Computes versions without an int8 graph in float32 or bfloat16.

    Args:
        backbone: The frozen network.
        precision: Arithmetic of backbone and heads.
        int8: Whether to compute versions in int8 that passed the int8 trial.
        threads: CPU threads; 0: all.

    Raises:
        ConfigError: OpenVINO is not installed.
    """

    concurrent_batches = 1
    copies = 4
    """Measured 3.1 after a batch of 1 and 3.7 after one of 8: weights, repacked weights and activations."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        precision: Literal["f32", "bf16"] = "f32",
        int8: bool = False,
        threads: int = 0,
    ) -> None:
        self.spec = backbone.spec
        self.precision: Arithmetic = "bfloat16" if precision == "bf16" else "float32"
        self._hint: Literal["f32", "bf16"] = precision
        self._threads = threads
        self.int8 = int8
        form = PixelForm.of(self.spec)
        self._backbone = CompiledModule(
            backbone, [form.shape], dtype=getattr(torch, form.dtype), precision=precision, threads=threads
        )

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> "_Run | Int8Flows":
        """Fold a head, compile it and run it once."""
        if self.int8 and (version := load_int8(head, manifest, read)) is not None:
            return version
        compiled = CompiledModule(
            FoldedHead(head),
            self.spec.feature_shapes,
            dtype=torch.float32,
            listed=True,
            precision=self._hint,
            threads=self._threads,
        )

        def run(features: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
            return compiled(*features)

        run([np.zeros((1, *shape), np.float32) for shape in self.spec.feature_shapes])
        return run

    def detect(
        self, images: Pixels, heads: Sequence[tuple["_Run | Int8Flows", NDArray[np.int64]]]
    ) -> list[NDArray[np.float32]]:
        """Run the backbone, then each head on its rows; see `Engine`."""
        return run_heads(self._backbone(images), heads, self.spec)


_Run = Callable[[Sequence[NDArray[np.float32]]], list[NDArray[np.float32]]]
