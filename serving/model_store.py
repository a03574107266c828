"""The versions that a detector has loaded: loads and warms them up, swaps in promoted ones, unloads unused ones.

Knows no batching and no Ray. `get` never blocks; `load` and `refresh` read the registry: call them in a thread.
"""

import contextlib
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from flawstream.engines.protocol import Engine, Loaded, arithmetic_of
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import RegistryError, UnknownCategoryError
from schemas.manifest import Calibration, ModelManifest

log = logging.getLogger(__name__)

_RETRY_S = 30.0
"""Time before loading a failed version is retried: the storage may have failed, and not the version."""


@dataclass(frozen=True, slots=True, eq=False)
class ResidentModel:
    """A loaded and warmed-up version.

    Attributes:
        manifest: Manifest of the version.
        loaded: Its head, loaded by the engine.
        calibration: Its calibration for the engine's arithmetic.
        calibration_scores: (n,) float64, ascending; the scores of that calibration.
        size_bytes: Its memory: `Engine.memory_of`.
    """

    manifest: ModelManifest
    loaded: Loaded
    calibration: Calibration
    calibration_scores: NDArray[np.float64]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Failure:
    version: str
    error: str
    at_s: float


class ModelStore:
    """Holds one loaded version per category; above a memory limit, unloads the least recently used.

    Args:
        registry: Registry of the versions.
        engine: Engine that runs them; a version with another backbone is refused.
        max_resident_bytes: The memory limit. The version used last stays loaded, even if it is larger.
        metrics: Metrics to update.

    Attributes:
        loads: Versions loaded since the start.
    """

    def __init__(
        self, registry: Registry, engine: Engine, max_resident_bytes: int, metrics: Metrics = NO_METRICS
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._max_resident_bytes = max_resident_bytes
        self._models: OrderedDict[str, ResidentModel] = OrderedDict()
        self._lock = Lock()
        self._known: dict[str, str] = {}
        self._failures: dict[str, _Failure] = {}
        self._metrics = metrics
        self.loads = 0

    @property
    def known(self) -> dict[str, str]:
        """The current version of every category, as of the last `refresh`."""
        return dict(self._known)

    @property
    def resident(self) -> list[str]:
        """The loaded versions, as `category@version`."""
        with self._lock:
            return [model.manifest.model for model in self._models.values()]

    @property
    def resident_bytes(self) -> int:
        """Memory of the loaded versions."""
        with self._lock:
            return self._size()

    @property
    def has_room(self) -> bool:
        """Whether one more version fits, if it is as large as the largest loaded one."""
        with self._lock:
            largest = max((model.size_bytes for model in self._models.values()), default=0)
            return self._size() + largest <= self._max_resident_bytes

    @property
    def categories_fit(self) -> bool:
        """Whether the versions of all categories fit, if those not loaded are as large as the loaded ones."""
        with self._lock:
            loaded = len(self._models)
            return not loaded or self._size() / loaded * len(self._known) <= self._max_resident_bytes

    def get(self, category: str) -> ResidentModel | None:
        """Return the loaded version of a category, or None."""
        with self._lock:
            model = self._models.get(category)
            if model is not None:
                self._models.move_to_end(category)
            return model

    def load(self, category: str) -> ResidentModel:
        """Load a category's current version and warm it up; then swap it in.

        Raises:
            UnknownCategoryError: The category has no current version.
            RegistryError: The current version cannot be used; a version loaded before stays. Logged once per version,
                and retried after 30 s.
        """
        recent = self._failures.get(category)
        if (
            recent is not None
            and time.monotonic() - recent.at_s < _RETRY_S
            and self._known.get(category, recent.version) == recent.version
        ):
            raise RegistryError(recent.error)
        version = self._registry.current(category)
        if version is None:
            raise UnknownCategoryError(
                f"category {category!r} has no current version in the registry; train it with `flawstream train`, "
                f"or promote one with `flawstream models promote {category} VERSION`"
            )
        present = self.get(category)
        if present is not None and present.manifest.version == version:
            return present
        try:
            model = self._prepare(category, version)
        except RegistryError as error:
            if recent is None or recent.version != version:
                log.exception(
                    "%s@%s cannot be used; the version before keeps serving; without one, the images stay pending",
                    category,
                    version,
                    extra={"category": category, "model": f"{category}@{version}"},
                )
            self._failures[category] = _Failure(version, str(error), time.monotonic())
            self._metrics.add(m.MODEL_LOADS, outcome="failed")
            raise
        self._failures.pop(category, None)
        unloaded: list[ResidentModel] = []
        with self._lock:
            self._models[category] = model
            self._models.move_to_end(category)
            while len(self._models) > 1 and self._size() > self._max_resident_bytes:
                _, oldest = self._models.popitem(last=False)
                unloaded.append(oldest)
                log.info(
                    "unloaded: %s, to stay within detector.max_resident_mb",
                    oldest.manifest.model,
                    extra=_log_fields(oldest),
                )
        log.info("loaded: %s", model.manifest.model, extra=_log_fields(model))
        self._update_metrics(model, present, unloaded)
        return model

    def _update_metrics(
        self, loaded: ResidentModel, swapped: ResidentModel | None, unloaded: list[ResidentModel]
    ) -> None:
        self.loads += 1
        self._metrics.add(m.MODEL_LOADS, outcome="swap" if swapped else "first")
        for model in (swapped, *unloaded):
            if model is not None:
                self._metrics.forget(m.MODEL_INFO, category=model.manifest.category, version=model.manifest.version)
        self._metrics.set(m.MODEL_INFO, 1, category=loaded.manifest.category, version=loaded.manifest.version)
        self._metrics.set(m.RESIDENT_CATEGORIES, len(self.resident))
        self._metrics.set(m.RESIDENT_BYTES, self.resident_bytes)

    def _prepare(self, category: str, version: str) -> ResidentModel:
        manifest = self._registry.manifest(category, version)
        self._refuse_other_backbone(manifest)
        calibration = manifest.calibration_in(arithmetic_of(self._engine, manifest))
        weights = self._registry.read_file(manifest, WEIGHTS_FILE)
        try:
            head = FastFlowHead.from_bytes(weights, manifest.backbone, manifest.flow)
            loaded = self._engine.load(head, manifest, partial(self._registry.read_file, manifest))
        except (
            RuntimeError,
            ValueError,
            ArithmeticError,
            LookupError,
        ) as error:  # the manifest does not match the weights
            raise RegistryError(f"{manifest.model} cannot be loaded: {error}; train it again") from error
        return ResidentModel(manifest, loaded, calibration, np.array(calibration.scores), self._engine.memory_of(head))

    def _size(self) -> int:
        return sum(model.size_bytes for model in self._models.values())

    def refresh(self) -> None:
        """Read the current versions, and swap in those of loaded categories. A failure is logged once per version.

        Raises:
            RegistryError: The registry cannot be read.
        """
        self._known = self._registry.currents()
        with self._lock:
            stale = [
                category
                for category, model in self._models.items()
                if self._known.get(category, model.manifest.version) != model.manifest.version
            ]
        for category in stale:
            with contextlib.suppress(RegistryError):  # `load` has logged it
                self.load(category)

    def _refuse_other_backbone(self, manifest: ModelManifest) -> None:
        ours, theirs = self._engine.spec, manifest.backbone
        if ours.identity != theirs.identity:
            raise RegistryError(
                f"{manifest.model} was trained on {theirs.summary}; this detector runs {ours.summary}. "
                "A service runs one backbone: promote a version with that one, serve the category from another "
                "registry, or, if all categories have moved to the new backbone, restart the service"
            )


def _log_fields(model: ResidentModel) -> dict[str, str]:
    return {"category": model.manifest.category, "model": model.manifest.model}
