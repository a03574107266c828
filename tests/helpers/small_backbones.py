"""The backbones of anomalib with few channels: fixtures are made in its environment too, so timm alone is imported."""

from collections.abc import Callable
from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)},
    "deit_base_distilled_patch16_384": {"img_size": 64, "embed_dim": 8, "depth": 9, "num_heads": 2, "num_classes": 3},
    "cait_m48_448": {"img_size": 64, "embed_dim": 8, "depth": 41, "num_heads": 2, "num_classes": 3},
}
SIDE = 64


def shrink(create_model: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `timm.create_model` so that the three networks come out small; the names stay."""

    def create_small(name: str, **arguments: Any) -> Any:
        return create_model(name, **SMALL.get(name, {}), **arguments)

    return create_small
