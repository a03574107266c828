"""What an export computes: torch modules of tensors in and a tuple of tensors out, each with its name and shape.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.

Knows no file format. The batch size is left open everywhere.
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
class Port:
    """A named tensor that goes in or comes out.

    Attributes:
        name: What consumers address it by.
        shape: Without the batch dimension, which comes first.
        dtype: That of the pixels for images, float32 for all else.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Graph:
    """A module ready to be written.

    Attributes:
        module: Takes a tensor per input and gives a tuple of a tensor per output.
        inputs: In the module's order.
        outputs: In the module's order.
    """

    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def examples(self) -> tuple[Tensor, ...]:
        """Make inputs to trace the module with. Two images: tracers take a batch of one for a constant."""
        return tuple(torch.zeros((2, *port.shape), dtype=port.dtype) for port in self.inputs)


@dataclass(frozen=True, slots=True)
class Extras:
    """What comes out beside the grids.

    Attributes:
        top_fraction: How the image score is taken from the grids, as the version was calibrated; None leaves it out.
        map: Whether the map comes out at the size of the image.
    """

    top_fraction: float | None = None
    map: bool = False

    def ports(self, size: int) -> tuple[Port, ...]:
        """Tell what comes out past the grids, for images of a side in pixels."""
        score = () if self.top_fraction is None else (Port(SCORE, (1,)),)
        return (*score, Port(MAP, (size, size))) if self.map else score


def images_port(spec: BackboneSpec) -> Port:
    """Name the pixels that go in, as they are decoded and resized."""
    form = PixelForm.of(spec)
    return Port(IMAGES, form.shape, getattr(torch, form.dtype))


def feature_ports(spec: BackboneSpec) -> tuple[Port, ...]:
    """Name the features between backbone and head."""
    return tuple(Port(f"features_{scale}", shape) for scale, shape in enumerate(spec.feature_shapes))


def grid_ports(spec: BackboneSpec) -> tuple[Port, ...]:
    """Name the grids."""
    return tuple(Port(f"grid_{scale}", (side, side)) for scale, side in enumerate(spec.grid_sizes))


def backbone_graph(backbone: Backbone) -> Graph:
    """Make the part that all categories share: images to features."""
    return Graph(_Features(backbone), (images_port(backbone.spec),), feature_ports(backbone.spec))


def head_graph(spec: BackboneSpec, head: FastFlowHead, extras: Extras) -> Graph:
    """Make the part that is one category's: features to grids and what comes with them."""
    return Graph(
        _Head(head, extras, spec.input_size),
        feature_ports(spec),
        (*grid_ports(spec), *extras.ports(spec.input_size)),
    )


def whole_graph(backbone: Backbone, head: FastFlowHead, extras: Extras) -> Graph:
    """Make a category's whole model: images to grids and what comes with them."""
    part = head_graph(backbone.spec, head, extras)
    return Graph(_Whole(backbone, part.module), (images_port(backbone.spec),), part.outputs)


class _Features(nn.Module):
    """The backbone under a forward of any number of tensors, as all graphs here have it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.eval()

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(*images))


class _Head(nn.Module):
    def __init__(self, head: FastFlowHead, extras: Extras, size: int) -> None:
        super().__init__()
        self.folded = FoldedHead(head)
        self.extras = extras
        self.size = size

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        grids: list[Tensor] = self.folded(list(features))
        outputs = [*grids]
        if self.extras.top_fraction is not None:
            outputs.append(image_scores(grids, self.extras.top_fraction)[:, None])
        if self.extras.map:
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
    """Average the scales at full size: what `flawstream.imaging.maps.upsample` does to arrays."""
    scales = [
        functional.interpolate(grid[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
        for grid in grids
    ]
    return torch.stack(scales).mean(dim=0)
