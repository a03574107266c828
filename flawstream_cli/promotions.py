"""Promotion of versions while a training run goes on, and the refusal of those worse than the current ones."""

import getpass
import os
import time
from collections.abc import Iterable

from flawstream.registry.registry import Registry
from flawstream_cli.terminal import print_message
from schemas.errors import RegistryError, StorageUnavailableError
from schemas.manifest import ModelManifest
from schemas.settings.registry import RegistrySettings

_PROMOTE_S = 5.0
"""Time between two promotions of a run: each reads every current version."""


class Promotions:
    """Promotes versions while a run goes on.

    A version that is worse than the current one is not promoted, unless forced: see `why_worse`.

    Args:
        settings: The registry, and how much worse a version may be.
        force: Whether to promote worse versions too, with a warning.
    """

    def __init__(self, settings: RegistrySettings, *, force: bool = False) -> None:
        self._registry = Registry(settings.root)
        self._settings = settings
        self._force = force
        self._waiting: dict[str, ModelManifest] = {}
        self._worse: dict[str, str] = {}
        self._promoted_s = time.monotonic()
        self._error = ""

    @property
    def refused(self) -> dict[str, str]:
        """Return the error of every category that was not promoted."""
        waiting = {
            category: f"{manifest.model} is written and not promoted: {self._error}"
            for category, manifest in self._waiting.items()
        }
        return self._worse | waiting

    def add(self, manifests: Iterable[ModelManifest]) -> None:
        """Add versions, and promote all that wait if the last time was a while ago."""
        self._waiting |= {manifest.category: manifest for manifest in manifests}
        if time.monotonic() - self._promoted_s >= _PROMOTE_S:
            self.close()

    def close(self) -> None:
        """Promote all versions that wait and are not current; if the registry refuses, keep them all for later."""
        try:
            currents = self._registry.currents()
            changed = {
                category: manifest
                for category, manifest in self._waiting.items()
                if currents.get(category) != manifest.version and not self._is_refused(manifest, currents.get(category))
            }
            if changed:
                self._registry.promote_all({category: manifest.version for category, manifest in changed.items()})
        except (RegistryError, StorageUnavailableError) as error:
            self._error = str(error)
        else:
            self._waiting.clear()
        self._promoted_s = time.monotonic()

    def _is_refused(self, manifest: ModelManifest, current: str | None) -> bool:
        """Compare a version with the current one, and note why it is worse; one that cannot be read is no measure."""
        if current is None:
            return False
        try:
            reason = why_worse(manifest, self._registry.manifest(manifest.category, current), self._settings)
        except RegistryError:
            return False
        if reason and self._force:
            print_message(f"warning: {_user()} has {manifest.model} promoted with --force: {reason}", "yellow")
        elif reason:
            self._worse[manifest.category] = (
                f"{manifest.model} is written and not promoted, because it is worse: {reason}; look at it with "
                f"`flawstream models report {manifest.category} {manifest.version}`, and promote it with `flawstream "
                f"models promote {manifest.category} {manifest.version}`"
            )
        return bool(reason) and not self._force


def why_worse(new: ModelManifest, current: ModelManifest, settings: RegistrySettings) -> str:
    """Return in what a version is worse than the current one, by the metrics of both on their test images.

    Args:
        new: The version.
        current: The current version of the category.
        settings: By how much the metrics may differ.

    Returns:
        Empty if it is not worse, or one of them was not measured.
    """
    ours, theirs = new.serving_metrics, current.serving_metrics
    reasons = []
    drop = (theirs.image_auroc or 0.0) - (ours.image_auroc or 0.0)
    if ours.image_auroc is not None and drop > settings.max_auroc_drop:
        reasons.append(
            f"its AUROC is {ours.image_auroc:.3f}, and {theirs.image_auroc:.3f} with {current.version} "
            f"(registry.max_auroc_drop is {settings.max_auroc_drop:g})"
        )
    if ours.false_alarm_rate is not None and theirs.false_alarm_rate is not None:
        rise = ours.false_alarm_rate - theirs.false_alarm_rate
        if rise > settings.max_false_alarm_rise:
            reasons.append(
                f"its threshold calls {ours.false_alarm_rate:.1%} of normal test images anomalous, and that of "
                f"{current.version} {theirs.false_alarm_rate:.1%} (registry.max_false_alarm_rise is "
                f"{settings.max_false_alarm_rise:g})"
            )
    return "; ".join(reasons)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"user {os.getuid()}"
