"""PyTorch on a GPU or a CPU: the reference that other engines agree with. The GPU path was not run on a GPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from schemas.manifest import ModelManifest
from serving.engines.engine import run_heads

_OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive")
"""What is said on a CPU where memory runs out, by torch's allocator and by oneDNN."""


class TorchEngine:
    """Runs in float32, channels last.

    Args:
        backbone: The frozen network; moved to the GPU where there is one.
    """

    copies = 1

    def __init__(self, backbone: Backbone) -> None:
        self.spec = backbone.spec
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._backbone = backbone.to(self._device)
        self._backbone.to(memory_format=torch.channels_last)

    def load(self, head: FastFlowHead, manifest: ModelManifest) -> "_Run":
        """Fold a head, move it to the device and run it once."""
        del manifest
        folded = FoldedHead(head).to(self._device)
        folded.to(memory_format=torch.channels_last)

        @torch.inference_mode()
        def run(features: Sequence[Tensor]) -> list[NDArray[np.float32]]:
            return [grid.cpu().numpy() for grid in folded(list(features))]

        run([torch.zeros((1, *shape), device=self._device) for shape in self.spec.feature_shapes])
        return run

    @torch.inference_mode()
    def detect(
        self, images: NDArray[np.uint8], heads: Sequence[tuple["_Run", NDArray[np.int64]]]
    ) -> list[NDArray[np.float32]]:
        """Run the backbone, then each head on its rows; see `Engine`."""
        with _memory_errors():
            # copied: arrays from shared memory are read-only, which torch warns of
            features: list[Tensor] = self._backbone(torch.tensor(images, device=self._device))
            return run_heads(features, heads, self.spec)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Call it `MemoryError` where memory runs out: torch has a class for it on a GPU and only words for it on a CPU."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
            raise MemoryError(str(error).splitlines()[0]) from error
        raise


_Run = Callable[[Sequence[Tensor]], list[NDArray[np.float32]]]
