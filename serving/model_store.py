"""The model versions a detector keeps ready: loaded from the registry, warmed up, swapped when another is promoted.

Knows no batching and no Ray. `get` never blocks; everything else reads the registry and belongs in a thread.
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
"""A version that failed is tried again so much later: the storage may have been at fault, and not the version."""


@dataclass(frozen=True, slots=True, eq=False)
class ResidentModel:
    """A version that is ready to judge.

    Attributes:
        manifest: What it is.
        loaded: Its head on the engine.
        calibration: Its thresholds in the arithmetic of the engine.
        calibration_scores: (n,) float64, ascending: the same calibration's.
        size_bytes: Memory that it takes in this process, by its weights and the engine.
    """

    manifest: ModelManifest
    loaded: Loaded
    calibration: Calibration
    calibration_scores: NDArray[np.float64]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Failure:
    version: str
    why: str
    at_s: float


class ModelStore:
    """Resident models by category; past a memory budget the least recently used goes.

    Args:
        registry: Where versions are.
        engine: Where they run; a version trained on another backbone is refused.
        max_resident_bytes: The budget. The model used last stays, whatever its size.
        metrics: Where numbers go.
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

    @property
    def known(self) -> dict[str, str]:
        """Tell the current version of every category as of the last `refresh`."""
        return dict(self._known)

    @property
    def resident(self) -> list[str]:
        """Tell which versions are ready, as `category@version`."""
        with self._lock:
            return [model.manifest.model for model in self._models.values()]

    @property
    def resident_bytes(self) -> int:
        """Tell how much memory the resident models take."""
        with self._lock:
            return self._size()

    @property
    def has_room(self) -> bool:
        """Tell whether one more model, as large as the largest resident, can stay beside the others."""
        with self._lock:
            largest = max((model.size_bytes for model in self._models.values()), default=0)
            return self._size() + largest <= self._max_resident_bytes

    def get(self, category: str) -> ResidentModel | None:
        """Give a category's model if it is resident."""
        with self._lock:
            model = self._models.get(category)
            if model is not None:
                self._models.move_to_end(category)
            return model

    def load(self, category: str) -> ResidentModel:
        """Load a category's current version, warm it up, and only then let it take traffic.

        Raises:
            UnknownCategoryError: The category has no current version.
            RegistryError: It has one that cannot be used; a version of before stays. Logged once a version, and for a
                while not tried again.
        """
        recent = self._failures.get(category)
        if (
            recent is not None
            and time.monotonic() - recent.at_s < _RETRY_S
            and self._known.get(category, recent.version) == recent.version
        ):
            raise RegistryError(recent.why)
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
                    "%s@%s cannot be used; a version of before goes on where there is one, else its images wait",
                    category,
                    version,
                    extra={"category": category, "model": f"{category}@{version}"},
                )
            self._failures[category] = _Failure(version, str(error), time.monotonic())
            self._metrics.add(m.MODEL_LOADS, outcome="failed")
            raise
        self._failures.pop(category, None)
        let_go: list[ResidentModel] = []
        with self._lock:
            self._models[category] = model
            self._models.move_to_end(category)
            while len(self._models) > 1 and self._size() > self._max_resident_bytes:
                _, gone = self._models.popitem(last=False)
                let_go.append(gone)
                log.info(
                    "let go: %s, for others to stay within detector.max_resident_mb",
                    gone.manifest.model,
                    extra=_names(gone),
                )
        log.info("ready: %s", model.manifest.model, extra=_names(model))
        self._count(model, present, let_go)
        return model

    def _count(self, ready: ResidentModel, swapped: ResidentModel | None, let_go: list[ResidentModel]) -> None:
        """Note what is resident now."""
        self._metrics.add(m.MODEL_LOADS, outcome="swap" if swapped else "first")
        for gone in (swapped, *let_go):
            if gone is not None:
                self._metrics.forget(m.MODEL_INFO, category=gone.manifest.category, version=gone.manifest.version)
        self._metrics.set(m.MODEL_INFO, 1, category=ready.manifest.category, version=ready.manifest.version)
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
        except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:  # a manifest whose numbers do not fit
            raise RegistryError(f"{manifest.model} cannot be made ready: {error}; train it again") from error
        size_bytes = self._engine.copies * sum(tensor.nbytes for tensor in head.state_dict().values())
        return ResidentModel(manifest, loaded, calibration, np.array(calibration.scores), size_bytes)

    def _size(self) -> int:
        return sum(model.size_bytes for model in self._models.values())

    def refresh(self) -> None:
        """Look for promoted versions and load those whose category is resident. A version that fails is said once.

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
                "One service runs one backbone: promote a version on that, serve the category from a registry of its "
                "own, or, where all categories have moved, restart the service"
            )


def _names(model: ResidentModel) -> dict[str, str]:
    """Name a model in a log line."""
    return {"category": model.manifest.category, "model": model.manifest.model}
