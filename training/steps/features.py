"""Features of the frozen backbone, computed once per image and read again in every epoch.

Shape legend: B images, C channels, H W height and width of a scale's grid, s a scale.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawstream.engines.openvino.compile import CompiledModule, openvino_is_installed
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.imaging.decode import DecodedImage, decode_image
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.errors import ConfigError, DatasetError, MessageError
from schemas.settings import LimitSettings

_BATCH = 16
_DECODE_THREADS = 2


class FeatureExtractor:
    """The backbone on the fastest thing at hand: a GPU, else OpenVINO where it is installed, else torch on the CPU.

    Args:
        backbone: The frozen network.
        limits: What is too large to be decoded.
        threads: CPU threads; 0 takes all.

    Attributes:
        backbone: As it was given, on whatever it runs.
        spec: Its specification.
        threads: CPU threads.
    """

    def __init__(self, backbone: Backbone, limits: LimitSettings, threads: int = 0) -> None:
        self.backbone = backbone
        self.spec = backbone.spec
        self.threads = threads
        self._limits = limits
        self._form = PixelForm.of(backbone.spec)
        self._run: Callable[[Pixels], list[Tensor]]
        self._compiles = not torch.cuda.is_available() and openvino_is_installed()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._compiles:
            dtype = getattr(torch, self._form.dtype)
            compiled = CompiledModule(backbone, [self._form.shape], dtype=dtype, threads=threads)
            self._run = lambda images: [torch.from_numpy(scale) for scale in compiled(images)]
        else:
            moved = backbone.to(self._device).to(memory_format=torch.channels_last)

            @torch.inference_mode()  # here and not around a `yield`, which would set it for whoever consumes
            def run(images: Pixels) -> list[Tensor]:
                return moved(torch.from_numpy(images).to(self._device))  # type: ignore[no-any-return]

            self._run = run

    def compile_head(self, head: FastFlowHead) -> Callable[[list[Tensor]], list[Tensor]]:
        """Make a head ready to run on features of `batches`, on what the backbone runs on.

        Returns:
            A function of one (B, C_s, H_s, W_s) tensor per scale to one (B, H_s, W_s) float32 CPU tensor per scale,
            nats per channel.
        """
        folded = FoldedHead(head)
        if self._compiles:
            shapes = self.spec.feature_shapes
            compiled = CompiledModule(folded, shapes, dtype=torch.float32, listed=True, threads=self.threads)
            return lambda features: [torch.from_numpy(grid) for grid in compiled(*(f.numpy() for f in features))]
        moved = folded.to(self._device)
        return lambda features: [grid.cpu() for grid in moved(features)]

    def batches(self, paths: Sequence[Path]) -> Iterator[tuple[list[DecodedImage], list[Tensor]]]:
        """Decode and compute, the next batch being decoded while one is computed.

        Yields:
            The images of a batch, and one (B, C_s, H_s, W_s) float32 tensor per scale.

        Raises:
            DatasetError: A file cannot be read or is no image.
        """
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            starts = range(0, len(paths), _BATCH)
            waiting = [pool.submit(self._read, path) for path in paths[:_BATCH]]
            for start in starts:
                images = [future.result() for future in waiting]
                waiting = [pool.submit(self._read, path) for path in paths[start + _BATCH : start + 2 * _BATCH]]
                yield images, self._run(np.stack([image.pixels for image in images]))

    def pixels(self, paths: Sequence[Path]) -> Pixels:
        """Decode images to (B, S, S, 3).

        Raises:
            DatasetError: A file cannot be read or is no image.
        """
        return np.stack([self._read(path).pixels for path in paths])

    def _read(self, path: Path) -> DecodedImage:
        try:
            return decode_image(path.read_bytes(), self._form, self._limits)
        except OSError as error:
            raise DatasetError(f"cannot read {path}: {error.strerror}") from error
        except MessageError as error:
            raise DatasetError(f"{path}: {error}; mend the file or take it out") from error


class FeatureCache:
    """Features of many images on disk, as float16 arrays that are mapped and not read whole.

    The files have no names: their room is free again when the cache, or its process, is gone, however it ends.

    Args:
        folder: On the disk that holds the arrays.
        paths: The images, at least one.
        extractor: Computes their features, in `fill`.

    Raises:
        ConfigError: The disk has too little room.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], extractor: FeatureExtractor) -> None:
        spec = extractor.spec
        self._paths = paths
        self._extractor = extractor
        self._scales = [_nameless_array(folder, (len(paths), *shape)) for shape in spec.feature_shapes]

    def fill(self) -> Iterator[int]:
        """Compute all features.

        Yields:
            The number of images done.

        Raises:
            DatasetError: A file cannot be read or is no image.
        """
        done = 0
        for images, features in self._extractor.batches(self._paths):
            for array, scale in zip(self._scales, features, strict=True):
                array[done : done + len(images)] = scale.cpu().numpy()
            done += len(images)
            yield done

    def take(self, rows: NDArray[np.int64]) -> list[Tensor]:
        """Read some images' features; one (B, C_s, H_s, W_s) float32 tensor per scale."""
        return [torch.from_numpy(array[rows].astype(np.float32)) for array in self._scales]

    def grid_rows(self, scale: int, images: NDArray[np.int64]) -> Iterator[Tensor]:
        """Read some images' features of one scale row by row of its grid; H times (N, C, W) float32."""
        array = self._scales[scale]
        for row in range(array.shape[2]):
            yield torch.from_numpy(array[images, :, row].astype(np.float32))


def _nameless_array(folder: Path, shape: tuple[int, ...]) -> NDArray[np.float16]:
    size_bytes = int(np.prod(shape)) * np.dtype(np.float16).itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a mapped file that meets a full disk would end the process
                os.posix_fallocate(file.fileno(), 0, size_bytes)
        except OSError as error:
            raise ConfigError(
                f"{folder} has no room for {size_bytes / 1e6:,.0f} MB of features ({error.strerror}); "
                "free some, or name another disk with TMPDIR"
            ) from error
        return np.memmap(file, np.float16, "w+", shape=shape)
