"""Torch modules to export, with the name and shape of every input and output tensor.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.

Knows no file format. The batch size is dynamic everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.score import image_scores
from flawstream.imaging.pixels import PixelForm
from schemas.manifest import BackboneSpec

IMAGES = "images"
SCORE = "score"
MAP = "map"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of an input or output.

    Attributes:
        name: The name in the exported file.
        shape: Without the leading batch dimension.
        dtype: The dtype of the pixels for images, else float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Graph:
    """A module to export.

    Attributes:
        module: Takes one tensor per input and returns a tuple of one tensor per output.
        inputs: In the module's order.
        outputs: In the module's order.
    """

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def examples(self) -> tuple[Tensor, ...]:
        """Create inputs to trace the module with: a batch of 2, as tracers treat a batch of 1 as a constant."""
        return tuple(torch.zeros((2, *tensor.shape), dtype=tensor.dtype) for tensor in self.inputs)


@dataclass(frozen=True, slots=True)
class ExtraOutputs:
    """Outputs in addition to the grids.

    Attributes:
        top_fraction: Export the image score, computed with the `top_fraction` of the calibration; None: no score.
        map: Export the anomaly map at the size of the image.
    """

    top_fraction: float | None = None
    map: bool = False

    def tensors(self, size: int) -> tuple[TensorSpec, ...]:
        """List the outputs after the grids, for images of `size` pixels a side."""
        score = () if self.top_fraction is None else (TensorSpec(SCORE, (1,)),)
        return (*score, TensorSpec(MAP, (size, size))) if self.map else score


def image_tensor(spec: BackboneSpec) -> TensorSpec:
    """Describe the input: decoded and resized pixels."""
    form = PixelForm.of(spec)
    return TensorSpec(IMAGES, form.shape, getattr(torch, form.dtype))


def feature_tensors(spec: BackboneSpec) -> tuple[TensorSpec, ...]:
    """Describe the features between backbone and head."""
    return tuple(TensorSpec(f"features_{scale}", shape) for scale, shape in enumerate(spec.feature_shapes))


def grid_tensors(spec: BackboneSpec) -> tuple[TensorSpec, ...]:
    """Describe the anomaly grids."""
    return tuple(TensorSpec(f"grid_{scale}", (side, side)) for scale, side in enumerate(spec.grid_sizes))


def backbone_graph(backbone: Backbone) -> Graph:
    """Create the graph that all categories share: images to features."""
    return Graph(_Features(backbone), (image_tensor(backbone.spec),), feature_tensors(backbone.spec))


def head_graph(spec: BackboneSpec, head: FastFlowHead, extra_outputs: ExtraOutputs) -> Graph:
    """Create the graph of one category: features to grids and extra outputs."""
    return Graph(
        _Head(head, extra_outputs, spec.input_size),
        feature_tensors(spec),
        (*grid_tensors(spec), *extra_outputs.tensors(spec.input_size)),
    )


def whole_graph(backbone: Backbone, head: FastFlowHead, extra_outputs: ExtraOutputs) -> Graph:
    """Create the complete model of one category: images to grids and extra outputs."""
    head_part = head_graph(backbone.spec, head, extra_outputs)
    return Graph(_Whole(backbone, head_part.module), (image_tensor(backbone.spec),), head_part.outputs)


class _Features(nn.Module):
    """The backbone with the `forward` signature of all graphs here: tensors in, a tuple of tensors out."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.eval()

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(*images))


class _Head(nn.Module):
    def __init__(self, head: FastFlowHead, extra_outputs: ExtraOutputs, size: int) -> None:
        super().__init__()
        self.folded = FoldedHead(head)
        self.extra_outputs = extra_outputs
        self.size = size

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        grids: list[Tensor] = self.folded(list(features))
        outputs = [*grids]
        if self.extra_outputs.top_fraction is not None:
            outputs.append(image_scores(grids, self.extra_outputs.top_fraction)[:, None])
        if self.extra_outputs.map:
            outputs.append(_upsample(grids, self.size))
        return tuple(outputs)


class _Whole(nn.Module):
    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.features = _Features(backbone)
        self.head = head

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.head(*self.features(*images))
        return outputs


def _upsample(grids: Sequence[Tensor], size: int) -> Tensor:
    """Average the scales at full size, as `flawstream.imaging.maps.upsample` does with arrays."""
    scales = [
        functional.interpolate(grid[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
        for grid in grids
    ]
    return torch.stack(scales).mean(dim=0)
