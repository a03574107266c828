"""PyTorch on a GPU or a CPU: the reference for other engines. Tests run it on a CPU only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawstream.engines.device import open_device
from flawstream.engines.protocol import Read, no_files, run_heads
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.imaging.pixels import Pixels
from schemas.manifest import Arithmetic, ModelManifest

_OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive")
"""Parts of the messages of torch's allocator and oneDNN when they are out of memory on a CPU."""

_ARITHMETICS: dict[torch.dtype | None, Arithmetic] = {
    None: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class TorchEngine:
    """Runs in the channels-last memory format.

    Args:
        backbone: The frozen network; moved to the GPU if there is one.
        half: Arithmetic of convolutions; None is float32, on a GPU without TF32. Normalisation and scores are always
            float32.
    """

    int8 = False
    concurrent_batches = 1
    copies = 1

    def __init__(self, backbone: Backbone, half: torch.dtype | None = None) -> None:
        self.spec = backbone.spec
        self._device = open_device()
        self._half = half
        self.precision: Arithmetic = _ARITHMETICS[half]
        if self._device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # there are few batch sizes, and shapes are fixed
        self._backbone = backbone.to(self._device)
        self._backbone.to(memory_format=torch.channels_last)

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> "_Run":
        """Fold a head, move it to the device and run it once."""
        del manifest, read
        folded = FoldedHead(head).to(self._device)
        folded.to(memory_format=torch.channels_last)

        @torch.inference_mode()
        def run(features: Sequence[Tensor]) -> list[NDArray[np.float32]]:
            normalised = [normalise(scale) for normalise, scale in zip(folded.statistics, features, strict=True)]
            with self._convolutions():
                grids = folded.score(normalised)
            return [grid.float().cpu().numpy() for grid in grids]

        run([torch.zeros((1, *shape), device=self._device) for shape in self.spec.feature_shapes])
        return run

    @torch.inference_mode()
    def detect(self, images: Pixels, heads: Sequence[tuple["_Run", NDArray[np.int64]]]) -> list[NDArray[np.float32]]:
        """Run the backbone, then each head on its rows; see `Engine`."""
        with _memory_errors():
            with self._convolutions():
                features: list[Tensor] = self._backbone(self._on_device(images))
            return run_heads([scale.float() for scale in features], heads, self.spec)

    def _on_device(self, images: Pixels) -> Tensor:
        """Copy a batch to the device, to a GPU from pinned memory. On a CPU too: torch needs writable memory."""
        copied = torch.tensor(images)
        if self._device.type == "cuda":
            return copied.pin_memory().to(self._device, non_blocking=True)
        return copied

    def _convolutions(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._half or torch.bfloat16, enabled=self._half is not None)


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
