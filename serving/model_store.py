"""The versions that a detector has loaded: loads and warms them up, swaps in promoted ones, unloads unused ones.

Knows no batching and no Ray. `get` never blocks; `load` and `refresh` read the registry: call them in a thread.

A model is in memory for as long as somebody has it: the store, a queued call, a batch that runs. All of them count.
"""

import contextlib
import gc
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from flawstream.engines.protocol import Engine, Loaded, arithmetic_of
from flawstream.fastflow.head import FastFlowHead
from flawstream.imaging.pixels import PixelForm
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import ModelUnavailableError, RegistryError, UnknownCategoryError
from schemas.manifest import Calibration, ModelManifest
from serving.availability import read_currents
from serving.engines import Engines

log = logging.getLogger(__name__)

_RETRY_S = 30.0
"""Time before loading a failed version is retried: the storage may have failed, and not the version."""
_ROOM_S = 10.0
"""Longest wait until calls have finished with unloaded versions, so that there is memory for another."""
_POLL_S = 0.01
_COLLECT_S = 1.0
"""After so long a wait the garbage collector runs: the traceback of a failed batch may keep its models."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ResidentModel:
    """A loaded and warmed-up version.

    Attributes:
        manifest: Manifest of the version.
        engine: The engine of its backbone.
        loaded: Its head, loaded by the engine.
        calibration: Its calibration for the engine's arithmetic.
        calibration_scores: (n,) float64, ascending; the scores of that calibration.
        size_bytes: Its memory: `Engine.memory_of`.
    """

    manifest: ModelManifest
    engine: Engine
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
    """Holds one loaded version per category; to stay within a memory limit, unloads the least recently used.

    Args:
        registry: Registry of the versions.
        engines: Engines that run them.
        max_resident_bytes: The memory limit, for versions in use too. Exceptions: a version that is larger is loaded
            alone, and one that is swapped in may be beside the one it replaces.
        metrics: Metrics to update.

    Attributes:
        loads: Versions loaded since the start.
    """

    def __init__(
        self, registry: Registry, engines: Engines, max_resident_bytes: int, metrics: Metrics = NO_METRICS
    ) -> None:
        self._registry = registry
        self._engines = engines
        self._max_resident_bytes = max_resident_bytes
        self._models: OrderedDict[str, ResidentModel] = OrderedDict()
        self._in_memory: list[weakref.ref[ResidentModel]] = []
        self._lock = Lock()
        self._known: dict[str, str] = {}
        self._current_forms: dict[str, tuple[str, PixelForm | None]] = {}
        self._forms: frozenset[PixelForm] = frozenset()
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
        """Memory of the loaded versions, and of unloaded ones that calls still use."""
        return self._bytes_besides(None)

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

    def get_all(self, categories: Iterable[str]) -> dict[str, ResidentModel]:
        """Return those of the categories that are loaded, with their versions."""
        with self._lock:
            models = {category: self._models[category] for category in categories if category in self._models}
            for category in models:
                self._models.move_to_end(category)
            return models

    def form_of(self, category: str) -> PixelForm:
        """Return the form of images that judge a category: of its loaded version, else of its current one.

        That of an unknown category, or a damaged version, is the first engine's.
        """
        model = self._models.get(category)
        if model is not None:
            return PixelForm.of(model.engine.spec, model.manifest.bit_depth)
        _, form = self._current_forms.get(category, ("", None))
        return form or PixelForm.of(self._engines.first.spec)

    @property
    def forms(self) -> frozenset[PixelForm]:
        """The forms of images that a current version takes, or any engine that is open."""
        return self._forms.union(PixelForm.of(engine.spec) for engine in self._engines.opened)

    def load(self, category: str) -> ResidentModel:
        """Load a category's current version and warm it up; then swap it in.

        Raises:
            UnknownCategoryError: The category has no current version.
            RegistryError: The current version cannot be used; a version loaded before stays. Logged once per version,
                and retried after 30 s.
            StorageUnavailableError: The registry cannot be read.
            ModelUnavailableError: There was no room in memory in time.
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
            read_currents(self._registry)  # raises where all of them are missing
            raise UnknownCategoryError(
                f"category {category!r} has no current version in the registry; train it with `flawstream train`, "
                f"or promote one with `flawstream models promote {category} VERSION`"
            )
        present = self.get(category)
        if present is not None and present.manifest.version == version:
            return present
        try:
            model = load_version(
                self._registry, self._engines, category, version, partial(self._make_room, replaced=present)
            )
            self._engines.warm_up_later_ones()
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
        with self._lock:
            self._in_memory.append(weakref.ref(model))
            self._models[category] = model
            self._models.move_to_end(category)
        log.info("loaded: %s", model.manifest.model, extra=_log_fields(model))
        self.loads += 1
        self._metrics.add(m.MODEL_LOADS, outcome="swap" if present else "first")
        if present is not None:
            self._forget(present)
        self._metrics.set(m.MODEL_INFO, 1, category=category, version=version)
        self._metrics.set(m.RESIDENT_CATEGORIES, len(self.resident))
        self._metrics.set(m.RESIDENT_BYTES, self.resident_bytes)
        return model

    def _forget(self, model: ResidentModel) -> None:
        self._metrics.forget(m.MODEL_INFO, category=model.manifest.category, version=model.manifest.version)

    def _make_room(self, size: int, replaced: ResidentModel | None) -> None:
        """Unload the least recently used versions until another fits, and wait until no call uses them.

        Args:
            size: Memory of the other version, in bytes.
            replaced: The version that it replaces, which serves meanwhile.

        Raises:
            ModelUnavailableError: Calls have used too many unloaded versions for too long.
        """
        self._unload_for(size, replaced)
        began_s = time.monotonic()
        collected = False
        while (used := self._bytes_besides(replaced)) and used + size > self._max_resident_bytes:
            waited_s = time.monotonic() - began_s
            if waited_s > _ROOM_S:
                raise ModelUnavailableError(
                    f"calls have used {used / 1e6:.1f} MB of versions for {waited_s:.0f} s, and {size / 1e6:.1f} MB "
                    f"more do not fit in {self._max_resident_bytes / 1e6:.0f} MB; raise detector.max_resident_mb, or "
                    "add replicas"
                )
            if waited_s > _COLLECT_S and not collected:
                gc.collect()
                collected = True
            time.sleep(_POLL_S)

    def _unload_for(self, size: int, replaced: ResidentModel | None) -> None:
        with self._lock:
            others = [model for model in self._models.values() if model is not replaced]
            excess = sum(model.size_bytes for model in others) + size - self._max_resident_bytes
            for oldest in others:
                if excess <= 0:
                    return
                excess -= oldest.size_bytes
                del self._models[oldest.manifest.category]
                self._forget(oldest)
                log.info(
                    "unloaded: %s, to stay within detector.max_resident_mb",
                    oldest.manifest.model,
                    extra=_log_fields(oldest),
                )

    def _bytes_besides(self, replaced: ResidentModel | None) -> int:
        """Return the memory of all versions that anybody has, without one."""
        with self._lock:
            self._in_memory = [one for one in self._in_memory if one() is not None]
            return sum(
                model.size_bytes for one in self._in_memory if (model := one()) is not None and model is not replaced
            )

    def _size(self) -> int:
        return sum(model.size_bytes for model in self._models.values())

    def refresh(self) -> None:
        """Read the current versions, and swap in those of loaded categories. A failure is logged once per version.

        Raises:
            StorageUnavailableError: The registry cannot be read, or has no current version.
        """
        self._known = read_currents(self._registry)
        self._read_forms()
        with self._lock:
            stale = [
                category
                for category, model in self._models.items()
                if self._known.get(category, model.manifest.version) != model.manifest.version
            ]
        for category in stale:
            with contextlib.suppress(RegistryError, ModelUnavailableError):  # `load` has logged the first
                self.load(category)

    def _read_forms(self) -> None:
        """Read the manifests of versions that became current since the last time."""
        before = self._current_forms
        changed = {name: version for name, version in self._known.items() if before.get(name, ("",))[0] != version}
        if not changed and before.keys() == self._known.keys():
            return
        manifests, _ = self._registry.manifests(changed)
        read = {one.category: PixelForm.of(one.backbone, one.bit_depth) for one in manifests}
        self._current_forms = {
            name: (version, read.get(name)) if name in changed else before[name]
            for name, version in self._known.items()
        }
        self._forms = frozenset(form for _, form in self._current_forms.values() if form is not None)


def load_version(
    registry: Registry,
    engines: Engines,
    category: str,
    version: str,
    make_room: Callable[[int], None] = lambda _bytes: None,
) -> ResidentModel:
    """Load a version and warm it up.

    Args:
        registry: The registry that has it.
        engines: The engines; that of its backbone runs it.
        category: Its category.
        version: Its name.
        make_room: Is given its memory in bytes before that is used.

    Raises:
        RegistryError: The version cannot be used.
        StorageUnavailableError: The registry cannot be read.
    """
    manifest = registry.manifest(category, version)
    engine = engines.engine_of(manifest)
    calibration = manifest.calibration_in(arithmetic_of(engine, manifest))
    weights = registry.read_file(manifest, WEIGHTS_FILE)
    try:
        head = FastFlowHead.from_bytes(weights, manifest.backbone, manifest.flow)
        size = engine.memory_of(head)
        make_room(size)
        loaded = engine.load(head, manifest, partial(registry.read_file, manifest))
    except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:  # the manifest does not match the weights
        raise RegistryError(f"{manifest.model} cannot be loaded: {error}; train it again") from error
    return ResidentModel(manifest, engine, loaded, calibration, np.array(calibration.scores), size)


def _log_fields(model: ResidentModel) -> dict[str, str]:
    return {"category": model.manifest.category, "model": model.manifest.model}
