"""The frozen backbone and the shape of the flows on it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    model_validator,
)

from schemas.presets import PRESETS, PresetName
from schemas.settings.section import PathOrUrl, Section

BackboneArithmetic = Literal["float32", "int8"]
"""In what a backbone computes, in training and serving alike."""
BitDepth = Literal[8, 10, 12, 14, 16]
"""How many of the lower bits a camera fills in files of 16 bits."""
Resize = Literal["area", "antialias"]
"""How an image becomes the square that a model sees: `flawstream.imaging.resize`."""


class ModelSettings(Section):
    """The frozen backbone and the shape of the flows on it. Fixed in a model version's manifest once trained."""

    preset: PresetName | None = Field(
        None,
        description="A configuration by name; what else is given here stands above it. `flawstream models presets`.",
    )
    backbone: str = Field(
        "tf_efficientnet_lite0", description="Any timm model that yields features by stage or, a transformer, by block."
    )
    weights: PathOrUrl = Field(
        "auto",
        description="`auto`: the installed package for tf_efficientnet_lite0 and tf_efficientnet_lite2, timm's own "
        "loading for all others. `package`, `timm`, or the path of a .safetensors, .pth or .pt state dict.",
    )
    strides: tuple[int, ...] = Field(
        (8, 16),
        min_length=1,
        description="Feature stages by their stride in pixels; stages past the last are cut off.",
    )
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        description="A transformer's blocks by index from 0, in place of stages: where given, strides are not used. "
        "Later blocks are cut off, and the network's last norm is applied.",
    )
    arithmetic: BackboneArithmetic = Field(
        "float32",
        description="In what the backbone computes, in training and serving alike: `int8` is for CPUs with VNNI or "
        "AMX. All categories of a service share it.",
    )
    input_size: int = Field(
        256, ge=32, le=2048, multiple_of=32, description="Side in pixels that images are resized to."
    )
    resize: Resize = Field(
        "area",
        description="How images are resized: `area` averages what a pixel covers, on JPEGs while they are decoded; "
        "`antialias` is the resize of torchvision and anomalib.",
    )
    flow_steps: int = Field(8, ge=1, le=64, description="Flow steps at each stage.")
    hidden_ratio: float = Field(1.0, gt=0, le=4, description="Hidden channels of a subnet over its input channels.")
    conv3x3_only: bool = Field(False, description="3x3 subnets in every step; otherwise 3x3 and 1x1 take turns.")  # noqa: FBT003
    clamp: float = Field(2.0, gt=0, description="Soft clamp of the log scale.")
    top_fraction: float = Field(
        0.03,
        ge=0,
        le=1,
        description="The image score is the mean of this share of the map's highest values; 0: the maximum.",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _preset_fills_what_is_not_given(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(given, Mapping) or given.get("preset") not in PRESETS:
            return handler(given)
        filled = handler({**PRESETS[given["preset"]].fields, **given})
        filled.model_fields_set.intersection_update(given)  # so that another preset on the command line replaces it
        return filled
