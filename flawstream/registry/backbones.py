"""The rule that all current versions of a registry use one backbone, because a service runs only one."""

from collections.abc import Mapping

from schemas.errors import MixedBackbonesError
from schemas.manifest import BackboneSpec

_MAX_LISTED = 10
"""Maximum number of categories that an error lists per backbone."""


def require_one_backbone(backbones: Mapping[str, BackboneSpec], problem: str, cure: str) -> None:
    """Refuse categories whose versions run on several backbones.

    Args:
        backbones: By category.
        problem: Start of the error message; the backbones and their categories follow.
        cure: End of the error message.

    Raises:
        MixedBackbonesError: There is more than one backbone.
    """
    categories: dict[tuple[object, ...], list[str]] = {}
    for category in sorted(backbones):
        categories.setdefault(backbones[category].identity, []).append(category)
    if len(categories) <= 1:
        return
    fewest_last = sorted(categories.values(), key=lambda names: (-len(names), names))
    listed = "; ".join(f"{backbones[names[0]].summary} ({_list_names(names)})" for names in fewest_last)
    raise MixedBackbonesError(f"{problem}: {listed}. One service runs one backbone: {cure}")


def _list_names(categories: list[str]) -> str:
    rest = len(categories) - _MAX_LISTED
    return ", ".join(categories[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
