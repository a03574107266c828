"""The rule that the current versions of a registry run on one backbone, because one service runs one."""

from collections.abc import Mapping

from schemas.errors import MixedBackbonesError
from schemas.manifest import BackboneSpec

_NAMED = 10
"""Categories of a backbone that an error names."""


def require_one_backbone(backbones: Mapping[str, BackboneSpec], problem: str, cure: str) -> None:
    """Refuse categories whose versions run on several backbones.

    Args:
        backbones: By category.
        problem: How the error begins; the backbones and the categories on each follow.
        cure: How it ends.

    Raises:
        MixedBackbonesError: There is more than one backbone.
    """
    categories: dict[tuple[object, ...], list[str]] = {}
    for category in sorted(backbones):
        categories.setdefault(backbones[category].identity, []).append(category)
    if len(categories) <= 1:
        return
    fewest_last = sorted(categories.values(), key=lambda names: (-len(names), names))
    listed = "; ".join(f"{backbones[names[0]].summary} ({_named(names)})" for names in fewest_last)
    raise MixedBackbonesError(f"{problem}: {listed}. One service runs one backbone: {cure}")


def _named(categories: list[str]) -> str:
    rest = len(categories) - _NAMED
    return ", ".join(categories[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
