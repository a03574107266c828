"""Promotion of versions while a training run goes on."""

import time
from collections.abc import Iterable

from flawstream.registry.registry import Registry
from schemas.errors import RegistryError, StorageUnavailableError
from schemas.manifest import ModelManifest

_PROMOTE_S = 5.0
"""Time between two promotions of a run: each reads every current version."""


class Promotions:
    """Promotes versions while a run goes on; in a run that changes the backbone, all together after the last one.

    Args:
        registry: The registry of the versions.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._waiting: dict[str, str] = {}
        self._promoted_s = time.monotonic()
        self._error = ""

    @property
    def refused(self) -> dict[str, str]:
        """Return the error of every category that was not promoted."""
        return {
            category: f"{category}@{version} is written and not promoted: {self._error}"
            for category, version in self._waiting.items()
        }

    def add(self, manifests: Iterable[ModelManifest]) -> None:
        """Add versions, and promote all that wait if the last time was a while ago."""
        self._waiting |= {manifest.category: manifest.version for manifest in manifests}
        if time.monotonic() - self._promoted_s >= _PROMOTE_S:
            self.close()

    def close(self) -> None:
        """Promote all versions that wait and are not current; if the registry refuses, keep them all for later."""
        try:
            current = self._registry.currents()
            changed = {one: version for one, version in self._waiting.items() if current.get(one) != version}
            if changed:
                self._registry.promote_all(changed)
        except (RegistryError, StorageUnavailableError) as error:
            self._error = str(error)
        else:
            self._waiting.clear()
        self._promoted_s = time.monotonic()
