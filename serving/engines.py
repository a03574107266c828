"""The engines of a detector: one for each backbone of its versions, opened when a version first needs it."""

import logging
from collections.abc import Callable
from threading import Lock

from flawstream.engines.choose import make_engine, quiet_torch
from flawstream.engines.protocol import Engine
from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream.registry.versions import open_backbone
from schemas.errors import ConfigError, RegistryError, WeightsError
from schemas.manifest import ModelManifest
from schemas.settings import DetectorSettings, ModelSettings

_log = logging.getLogger(__name__)


def _refuse(_manifest: ModelManifest) -> Engine:
    raise ConfigError("this detector runs one backbone")


class Engines:
    """Gives each version the engine of its backbone. Engines stay open until the process ends.

    Args:
        first: The engine that is there from the start.
        open_other: Opens the engine for a version on another backbone; absent: such versions are refused.
    """

    def __init__(self, first: Engine, open_other: Callable[[ModelManifest], Engine] = _refuse) -> None:
        self.first = first
        self._open_other = open_other
        self._engines = {first.spec.identity: first}
        self._cold = [first]
        self._are_warm = False
        self._lock = Lock()

    @property
    def opened(self) -> list[Engine]:
        """Return the engines that are open, in the order in which they were opened."""
        return list(self._engines.values())

    @property
    def usable(self) -> bool:
        """Return whether all of them can compute."""
        return all(engine.usable for engine in self.opened)

    def engine_of(self, manifest: ModelManifest) -> Engine:
        """Return the engine for a version; opening the first one of a backbone takes seconds.

        Raises:
            RegistryError: The backbone cannot be opened here.
            TransientError: The engine is on another machine and does not answer.
        """
        theirs = manifest.backbone
        with self._lock:
            engine = self._engines.get(theirs.identity)
            if engine is None:
                try:
                    engine = self._open_other(manifest)
                except (ConfigError, WeightsError) as error:
                    raise RegistryError(f"{manifest.model} runs on {theirs.summary}, and {error}") from error
                if engine.spec.identity != theirs.identity:  # a Triton server has one, whatever is asked for
                    raise RegistryError(
                        f"{manifest.model} was trained on {theirs.summary}; this engine runs {engine.spec.summary}: "
                        "promote a version with that backbone, or serve the category from another registry"
                    )
                _log.info("another backbone: %s", theirs.summary)
                self._engines[theirs.identity] = engine
                self._cold.append(engine)
            return engine

    def warm_up(self) -> None:
        """Prepare the engines for batches of every size; call this when the first versions are loaded.

        Raises:
            ConfigError: There is too little memory for even one image.
        """
        with self._lock:
            self._are_warm = True
            while self._cold:
                self._cold[0].warm_up()
                self._cold.pop(0)

    def warm_up_later_ones(self) -> None:
        """Prepare engines that were opened after `warm_up`; before it, do nothing.

        Raises:
            RegistryError: There is too little memory.
        """
        if self._are_warm and self._cold:
            try:
                self.warm_up()
            except ConfigError as error:
                raise RegistryError(f"there is no room for another backbone: {error}") from error


def open_engines(registry: Registry, model: ModelSettings, settings: DetectorSettings, threads: int = 0) -> Engines:
    """Open the engine for the newest current version of a registry, and be ready to open those of other backbones.

    Args:
        registry: The registry.
        model: The backbone if the registry is empty, and its weights if those of the versions came from a file.
        settings: Which engine.
        threads: CPU threads of ncnn and OpenVINO; 0: all.

    Raises:
        ConfigError: The engine is not installed, or the backbone does not exist.
        WeightsError: The backbone's weights cannot be loaded.
        RegistryError: All current versions are damaged.
        TransientError: The registry cannot be read, or the engine is on another machine and does not answer.
    """

    def open_one(manifest: ModelManifest | None) -> Engine:
        def backbone() -> Backbone:
            return Backbone(model) if manifest is None else open_backbone(registry, manifest, model)

        engine = make_engine(settings, backbone, threads)
        quiet_torch(engine)
        return engine

    return Engines(open_one(newest_manifest(registry)), open_one)


def newest_manifest(registry: Registry) -> ModelManifest | None:
    """Return the newest current version, or None if there are no versions. Damaged versions are ignored.

    Raises:
        RegistryError: All current versions are damaged.
        StorageUnavailableError: The registry cannot be read.
    """
    manifests, damaged = registry.current_manifests()
    if damaged and not manifests:
        raise damaged[0]
    return max(manifests, key=lambda manifest: manifest.created_at, default=None)
