"""PyTorch in float32, on a CPU or a GPU: the reference for other engines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawstream.engines.device import open_device
from flawstream.engines.protocol import HeadRows, Read, ScoredBatch, no_files, run_heads, score_batch, weights_bytes
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.imaging.pixels import Pixels
from schemas.manifest import Arithmetic, ModelManifest

_OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive")
"""Parts of the messages of torch's allocator and oneDNN when they are out of memory on a CPU."""


class TorchEngine:
    """Runs in the channels-last memory format.

    Args:
        backbone: The frozen network; moved to the device.
        device: From `device.open_device`; None chooses the GPU if there is one.
    """

    precision: Arithmetic = "float32"
    trial_arithmetic: Arithmetic | None = None
    concurrent_batches = 1
    usable = True

    def __init__(self, backbone: Backbone, device: torch.device | None = None) -> None:
        self.spec = backbone.spec
        self._device = device or open_device()
        self._backbone = backbone.to(self._device)
        self._backbone.to(memory_format=torch.channels_last)

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> "_Run":
        """Fold a head, move it to the device and run it once."""
        del manifest, read
        folded = FoldedHead(head).to(self._device)
        folded.to(memory_format=torch.channels_last)

        @torch.inference_mode()
        def run(features: Sequence[Tensor]) -> list[NDArray[np.float32]]:
            return [grid.cpu().numpy() for grid in folded(list(features))]

        run([torch.zeros((1, *shape), device=self._device) for shape in self.spec.feature_shapes])
        return run

    def memory_of(self, head: FastFlowHead) -> int:
        """Return the size of a head's float32 weights, in bytes."""
        return weights_bytes(head)

    def warm_up(self) -> None:
        """Do nothing: `load` runs each head."""

    @torch.inference_mode()
    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        """Run the backbone, then each head on its rows; see `Engine`."""
        with _memory_errors():
            # a copy, on a CPU too: torch needs writable memory
            features = self._backbone(torch.tensor(images, device=self._device))
            return score_batch(run_heads(features, heads, self.spec), heads)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Raise `MemoryError` if torch is out of memory; on a CPU only the message says so."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            raise MemoryError(str(error).splitlines()[0]) from error
        raise


_Run = Callable[[Sequence[Tensor]], list[NDArray[np.float32]]]
