"""Features of the frozen backbone, computed once per image and read in every epoch.

Shape legend: B images, C channels, H W height and width of a scale's grid, s a scale.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawstream.engines.device import open_device
from flawstream.engines.openvino.compile import CompiledModule, openvino_is_installed
from flawstream.fastflow.backbone import Backbone
from flawstream.imaging.decode import DecodedImage, decode_image
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.errors import ConfigError
from schemas.settings import BitDepth, LimitSettings
from training.datasets.storage import READS_AT_ONCE, image_errors, is_url, read_file

_BATCH = 16
_DECODE_THREADS = 2


class FeatureExtractor:
    """Computes features: on a GPU, else with OpenVINO if installed, else with torch on the CPU.

    Always in float32, on a GPU without TF32: a version's statistics are computed from these features.

    Args:
        backbone: The frozen network.
        limits: Maximum size and aspect ratio of images.
        threads: CPU threads; 0: all.

    Attributes:
        backbone: The frozen network, on its device.
        spec: Its description.
        threads: CPU threads.
        limits: Maximum size and aspect ratio of images.
        form: Form of the pixels that the backbone takes, and how files of 16 bits become them.
    """

    def __init__(self, backbone: Backbone, limits: LimitSettings, threads: int = 0) -> None:
        self.backbone = backbone
        self.spec = backbone.spec
        self.threads = threads
        self.limits = limits
        self.form = PixelForm.of(backbone.spec)
        self._compiled = _CompiledBackbone(backbone, self.form, threads)

    def at_depth(self, bits: BitDepth) -> "FeatureExtractor":
        """Return one with the same compiled backbone that reads files of 16 bits by so many: a category's own depth."""
        other = copy.copy(self)
        other.form = replace(self.form, bits=bits)
        return other

    def batches(self, paths: Sequence[Path]) -> Iterator[tuple[list[DecodedImage], list[Tensor]]]:
        """Compute features in batches; the next batch is decoded meanwhile.

        Yields:
            The images of a batch, and one (B, C_s, H_s, W_s) float32 tensor per scale.

        Raises:
            DatasetError: A file cannot be read or is not an image.
        """
        for images in decode_batches(paths, self.form, self.limits):
            yield images, self._compiled.run(np.stack([image.pixels for image in images]))


class _CompiledBackbone:
    """Compiles the backbone when features are first needed, which imports never do.

    Args:
        backbone: The frozen network.
        form: Form of the pixels that it takes, whatever the depth of their files.
        threads: CPU threads; 0: all.
    """

    def __init__(self, backbone: Backbone, form: PixelForm, threads: int) -> None:
        self._backbone = backbone
        self._form = form
        self._threads = threads

    @cached_property
    def run(self) -> Callable[[Pixels], list[Tensor]]:
        """Map (B, S, S, 3) pixels to one (B, C_s, H_s, W_s) float32 tensor per scale."""
        device = open_device()
        if device.type == "cpu" and openvino_is_installed():
            dtype = getattr(torch, self._form.dtype)
            compiled = CompiledModule(self._backbone, [self._form.shape], dtype=dtype, threads=self._threads)
            return lambda images: [torch.from_numpy(scale) for scale in compiled(images)]
        network = self._backbone.to(device).to(memory_format=torch.channels_last)

        @torch.inference_mode()  # not around a `yield`, which would set it for the caller too
        def run(images: Pixels) -> list[Tensor]:
            return network(torch.from_numpy(images).to(device))  # type: ignore[no-any-return]

        return run


def decode_batches(paths: Sequence[Path], form: PixelForm, limits: LimitSettings) -> Iterator[list[DecodedImage]]:
    """Decode image files in batches, in order; the next batch is decoded while the caller processes one.

    Args:
        paths: The files.
        form: Size and filter to resize to.
        limits: Maximum size and aspect ratio of images.

    Raises:
        DatasetError: A file cannot be read or is not an image.
    """
    threads = READS_AT_ONCE if any(map(is_url, paths)) else _DECODE_THREADS
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(read_image, path, form, limits) for path in paths[:_BATCH]]
        for start in range(0, len(paths), _BATCH):
            images = [future.result() for future in waiting]
            waiting = [
                pool.submit(read_image, path, form, limits) for path in paths[start + _BATCH : start + 2 * _BATCH]
            ]
            yield images


def read_image(path: Path, form: PixelForm, limits: LimitSettings) -> DecodedImage:
    """Read and decode one file.

    Raises:
        DatasetError: The file cannot be read or is not an image.
    """
    with image_errors(path):
        return decode_image(read_file(path), form, limits)


class FeatureStore:
    """Features of many images on disk, as memory-mapped float16 arrays.

    The files have no names, so that their space is freed with the store or its process, even after a crash.

    Args:
        folder: A folder on the disk for the arrays.
        count: Number of images.
        shapes: (C, H, W) of each scale.

    Raises:
        ConfigError: The disk has too little space.
    """

    def __init__(self, folder: Path, count: int, shapes: Sequence[tuple[int, int, int]]) -> None:
        self._folder = folder
        self._scales = [_unnamed_array(folder, (count, *shape)) for shape in shapes]

    def take(self, rows: NDArray[np.int64]) -> list[Tensor]:
        """Read the features of some images: one (B, C_s, H_s, W_s) float32 tensor per scale."""
        return [torch.from_numpy(array[rows].astype(np.float32)) for array in self._scales]

    def put(self, rows: NDArray[np.int64] | slice, features: Sequence[Tensor]) -> None:
        """Write the features of some images: one (B, C_s, H_s, W_s) tensor per scale."""
        for array, scale in zip(self._scales, features, strict=True):
            array[rows] = scale.cpu().numpy()

    def grid_rows(self, scale: int, images: NDArray[np.int64]) -> Iterator[Tensor]:
        """Read one scale of some images by rows of its grid: H arrays of (N, C, W) float32."""
        array = self._scales[scale]
        for row in range(array.shape[2]):
            yield torch.from_numpy(array[images, :, row].astype(np.float32))

    def empty_like(self, count: int) -> "FeatureStore":
        """Create a store of the same shapes for other images.

        Raises:
            ConfigError: The disk has too little space.
        """
        shapes = [(array.shape[1], array.shape[2], array.shape[3]) for array in self._scales]
        return FeatureStore(self._folder, count, shapes)


class FeatureCache(FeatureStore):
    """Features of image files.

    Args:
        folder: A folder on the disk for the arrays.
        paths: The images, at least one.
        extractor: Computes the features in `fill`.

    Raises:
        ConfigError: The disk has too little space.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], extractor: FeatureExtractor) -> None:
        super().__init__(folder, len(paths), extractor.spec.feature_shapes)
        self._paths = paths
        self._extractor = extractor

    def fill(self) -> Iterator[int]:
        """Compute all features.

        Yields:
            The number of images done.

        Raises:
            DatasetError: A file cannot be read or is not an image.
        """
        done = 0
        for images, features in self._extractor.batches(self._paths):
            self.put(slice(done, done + len(images)), features)
            done += len(images)
            yield done


def _unnamed_array(folder: Path, shape: tuple[int, ...]) -> NDArray[np.float16]:
    size_bytes = int(np.prod(shape)) * np.dtype(np.float16).itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # on a full disk, writing to a mapped file would kill the process
                os.posix_fallocate(file.fileno(), 0, size_bytes)
        except OSError as error:
            raise ConfigError(
                f"{folder} has no space for {size_bytes / 1e6:,.0f} MB of features ({error.strerror}); "
                "free some, or set TMPDIR to a folder on another disk"
            ) from error
        return np.memmap(file, np.float16, "w+", shape=shape)
