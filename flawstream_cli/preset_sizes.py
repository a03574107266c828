"""What `flawstream models presets` shows, and docs/reference/presets.md holds: how large each preset is."""

from dataclasses import dataclass

from flawstream.fastflow.size import measure
from schemas.presets import PRESETS
from schemas.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class PresetSize:
    """One row.

    Attributes:
        preset: Its name.
        backbone: timm's name.
        layers: Which layers give the features.
        input_size: Side in pixels.
        backbone_parameters: Kept of the backbone.
        added_parameters: Trained.
        backbone_macs: For one image.
        flow_macs: For one image.
        paper_added_parameters: What the paper gives; absent for what is not in it.
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
        """Name the cells."""
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
        """Write the row for a person: millions of parameters, 10^9 multiply-accumulates an image."""
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
    """Count all presets; no weights are needed."""
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
