"""Model settings by name: the paper's four configurations, and those whose weights are installed with flawstream."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

PresetName = Literal["resnet18", "wide_resnet50_2", "deit", "cait", "efficientnet_lite0", "efficientnet_lite2"]


@dataclass(frozen=True, slots=True)
class Preset:
    """One configuration.

    Attributes:
        fields: What it sets of `ModelSettings`; all else keeps its default.
        paper_added_parameters: Parameters besides the backbone's by the paper's table 1; absent: not in the paper.
    """

    fields: dict[str, Any]
    paper_added_parameters: float | None = None


_STAGES = {"strides": (4, 8, 16), "input_size": 256, "flow_steps": 8, "hidden_ratio": 1.0}
_TRANSFORMER = {"flow_steps": 20, "hidden_ratio": 0.16, "conv3x3_only": False}

PRESETS: dict[PresetName, Preset] = {
    "resnet18": Preset({"backbone": "resnet18", **_STAGES, "conv3x3_only": True}, 4.9e6),
    "wide_resnet50_2": Preset({"backbone": "wide_resnet50_2", **_STAGES, "conv3x3_only": False}, 41.3e6),
    "deit": Preset(
        {"backbone": "deit_base_distilled_patch16_384", "blocks": (7,), "input_size": 384, **_TRANSFORMER}, 14.8e6
    ),
    "cait": Preset({"backbone": "cait_m48_448", "blocks": (40,), "input_size": 448, **_TRANSFORMER}, 14.8e6),
    "efficientnet_lite0": Preset({"backbone": "tf_efficientnet_lite0"}),
    "efficientnet_lite2": Preset({"backbone": "tf_efficientnet_lite2"}),
}
"""Source: FastFlow, sections 4.1 and 4.2 and table 6. What the paper leaves open is as in public re-implementations:
docs/reference/presets.md names them, and the consequences."""

assert set(PRESETS) == set(get_args(PresetName))  # noqa: S101 - one name a preset
