"""Sizes of the presets, as shown by `flawstream models presets` and docs/reference/presets.md."""

from dataclasses import dataclass

from flawstream.fastflow.size import measure
from schemas.presets import PRESETS
from schemas.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class PresetSize:
    """Size of one preset.

    Attributes:
        preset: Name of the preset.
        backbone: Name in timm.
        layers: Layers whose features are used.
        input_size: Side in pixels.
        backbone_parameters: Parameters up to the last layer used; frozen.
        added_parameters: Trained parameters.
        backbone_macs: Multiply-accumulates per image.
        flow_macs: Multiply-accumulates per image.
        paper_added_parameters: Added parameters in millions in the paper; None if the preset is not in the paper.
    """

    preset: str
    backbone: str
    layers: str
    input_size: int
    backbone_parameters: int
    added_parameters: int
    backbone_macs: int
    flow_macs: int
    paper_added_parameters: float | None

    @staticmethod
    def columns() -> tuple[str, ...]:
        """Return the column titles of `cells`."""
        return (
            "preset",
            "backbone",
            "layers",
            "input px",
            "backbone M",
            "added M",
            "paper M",
            "added / paper",
            "backbone GMAC",
            "flow GMAC",
        )

    def cells(self) -> tuple[str, ...]:
        """Format as a table row: parameters in millions, multiply-accumulates per image in 10^9."""
        paper = self.paper_added_parameters
        return (
            self.preset,
            self.backbone,
            self.layers,
            str(self.input_size),
            f"{self.backbone_parameters / 1e6:.2f}",
            f"{self.added_parameters / 1e6:.2f}",
            f"{paper / 1e6:.1f}" if paper else "-",
            f"{self.added_parameters / paper:.3f}" if paper else "-",
            f"{self.backbone_macs / 1e9:.2f}",
            f"{self.flow_macs / 1e9:.2f}",
        )


def preset_sizes() -> list[PresetSize]:
    """Count the parameters and multiply-accumulates of all presets; needs no weights."""
    sizes = []
    for name, preset in PRESETS.items():
        size = measure(ModelSettings(preset=name))
        sizes.append(
            PresetSize(
                name,
                size.spec.name,
                size.spec.layers,
                size.spec.input_size,
                size.backbone_parameters,
                size.added_parameters,
                size.backbone_macs,
                size.flow_macs,
                preset.paper_added_parameters,
            )
        )
    return sizes
