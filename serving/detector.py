"""The detector: engine, loaded versions and batching behind the `Detector` protocol. Knows no Ray.

Shape legend: B images, S side of an image in pixels, H W height and width of a scale's grid.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

import numpy as np

from flawstream.calibration import is_anomalous, p_values
from flawstream.engines.choose import make_engine, quiet_torch
from flawstream.engines.protocol import Engine, HeadRows
from flawstream.fastflow.backbone import Backbone
from flawstream.imaging.maps import published_grid
from flawstream.imaging.pixels import PixelForm, Pixels
from flawstream.registry.backbones import require_one_backbone
from flawstream.registry.registry import Registry
from flawstream.registry.versions import open_backbone
from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import (
    ModelUnavailableError,
    Reason,
    RegistryError,
    ShapeError,
    StorageUnavailableError,
    TransientError,
    UnknownCategoryError,
)
from schemas.manifest import ModelManifest
from schemas.messages import Verdict
from schemas.settings import DetectorSettings, ModelSettings
from serving.availability import LOG_S
from serving.batching import DrainBatcher
from serving.model_store import ModelStore, ResidentModel
from workers.ports import Deferral, Detection, Judgement, Refusal

log = logging.getLogger(__name__)

_LOAD_S = 10.0
"""Longest wait of a call for a version that is not loaded; then its images are deferred, and loading goes on."""


class DetectorService:
    """Judges images of any mix of categories (`workers.ports.Detector`).

    Args:
        registry: Registry of the model versions.
        engine: Engine that runs them.
        settings: Batching, and the memory for loaded versions.
        metrics: Metrics to update.
    """

    def __init__(
        self, registry: Registry, engine: Engine, settings: DetectorSettings, metrics: Metrics = NO_METRICS
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._store = ModelStore(registry, engine, settings.max_resident_mb * 1_000_000, metrics)
        self._batcher = DrainBatcher(
            self._judge,
            concurrent_batches=engine.concurrent_batches,
            max_batch_images=settings.max_batch_images,
            max_queue_images=settings.max_queue_images,
            target_batch_s=None if settings.target_batch_ms is None else settings.target_batch_ms / 1000,
            metrics=metrics,
        )
        self._metrics = metrics
        self._loading = asyncio.Lock()
        self._loads: dict[str, asyncio.Task[ResidentModel | Refusal | Deferral]] = {}
        self._refreshed_at_s = -np.inf
        self._away = ""
        self._away_logged_s = -np.inf
        self._refresh_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the current versions, warm the engine up, then start the batcher and the search for new versions."""
        await asyncio.to_thread(self._preload)
        await asyncio.to_thread(self._engine.warm_up)
        self._batcher.start()
        self._refresh_task = asyncio.create_task(self._refresh_for_ever())

    async def stop(self) -> None:
        """Finish the batches in flight and stop. Queued calls are refused; another replica may take them."""
        if self._refresh_task is not None:
            self._refresh_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refresh_task
        loads = list(self._loads.values())
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        await self._batcher.stop()

    @property
    def alive(self) -> bool:
        """Whether the engine is usable, and the batcher and the refresh task run."""
        refreshes = self._refresh_task is not None and not self._refresh_task.done()
        return self._engine.usable and self._batcher.alive and refreshes

    def status(self) -> dict[str, object]:
        """Return engine, loaded versions and counts."""
        return {
            "engine": type(self._engine).__name__.removesuffix("Engine").lower(),
            "backbone": self._engine.spec.name,
            "input_size": self._engine.spec.input_size,
            "categories": self._store.known,
            "resident": self._store.resident,
            "loads": self._store.loads,
            "resident_mb": round(self._store.resident_bytes / 1e6, 1),
            "batches": self._batcher.batches,
            "images": self._batcher.images,
            "halvings": self._batcher.halvings,
            "queued_images": self._batcher.queued_images,
            "detect_s": self._batcher.detect_s,
            "calls_s": self._batcher.calls_s,
        }

    @property
    def work(self) -> tuple[int, float]:
        """Return how many images were judged, and the seconds in which any was."""
        return self._batcher.images, self._batcher.busy_s

    @property
    def categories_fit(self) -> bool:
        """Return whether all categories fit into the memory for loaded versions."""
        return self._store.categories_fit

    async def pixel_form(self) -> PixelForm:
        """Return the form that images must have."""
        return PixelForm.of(self._engine.spec)

    async def detect(self, images: Pixels, categories: Sequence[str]) -> list[Judgement]:
        """Judge a batch.

        Args:
            images: (B, S, S, 3), of the form that `pixel_form` returns.
            categories: The B images' categories.

        Returns:
            For each image in order: a detection; a refusal if its category is unknown; or a deferral if the category's
            current version cannot be used.

        Raises:
            DetectorOverloadedError: The queue is full; nothing was judged.
            ShapeError: The images have another size or dtype.
        """
        form = PixelForm.of(self._engine.spec)
        shape = (len(categories), *form.shape)
        if images.shape != shape or images.dtype != form.dtype:
            raise ShapeError(f"expected {shape} {form.dtype}, got {images.shape} {images.dtype}")
        resident = self._store.get_all(categories)
        tags = [resident[category] for category in categories if category in resident]
        if len(tags) == len(images):
            return list(await self._batcher.submit(images, tags))
        rows = [row for row, category in enumerate(categories) if category in resident]
        missing: dict[str, list[int]] = {}
        for row, category in enumerate(categories):
            if category not in resident:
                missing.setdefault(category, []).append(row)
        parts = [
            self._judge_rows(images, rows, tags),
            *(self._load_and_judge(images, rows, category) for category, rows in missing.items()),
        ]
        del resident, tags  # loading another version may have to wait until no call uses these
        judgements: dict[int, Judgement] = {}
        for part in await asyncio.gather(*parts, return_exceptions=True):
            if isinstance(part, BaseException):
                raise part
            judgements |= part
        return [judgements[row] for row in range(len(images))]

    async def _judge_rows(
        self, images: Pixels, rows: Sequence[int], tags: Sequence[ResidentModel]
    ) -> dict[int, Judgement]:
        return dict(zip(rows, await self._batcher.submit(images[rows], tags), strict=True))

    async def _load_and_judge(self, images: Pixels, rows: Sequence[int], category: str) -> dict[int, Judgement]:
        """Judge the rows of a category that is not loaded: apart from the others, which need not wait for it."""
        model = await self._load(category)
        if not isinstance(model, ResidentModel):
            return dict.fromkeys(rows, model)
        return await self._judge_rows(images, rows, [model] * len(rows))

    def _judge(self, images: Pixels, models: Sequence[ResidentModel]) -> list[Detection]:
        """Judge one batch; called in a thread of the batcher."""
        rows_of: dict[ResidentModel, list[int]] = {}
        for row, model in enumerate(models):
            rows_of.setdefault(model, []).append(row)
        heads = [
            HeadRows(model.loaded, np.array(rows, np.int64), model.calibration.top_fraction)
            for model, rows in rows_of.items()
        ]
        scored = self._engine.detect(images, heads)
        halves = [published_grid(grid) for grid in scored.grids]
        detections: list[Detection | None] = [None] * len(images)
        for model, rows in rows_of.items():
            calibration = model.calibration
            scores = scored.scores[rows]
            shares = p_values(model.calibration_scores, scores)
            verdicts = is_anomalous(scores, calibration.threshold)
            for row, score, share, anomalous in zip(
                rows, scores.tolist(), shares.tolist(), verdicts.tolist(), strict=True
            ):
                detections[row] = Detection(
                    score=score,
                    p_value=share,
                    threshold=calibration.threshold,
                    pixel_threshold=calibration.pixel_threshold,
                    verdict=Verdict.ANOMALOUS if anomalous else Verdict.NORMAL,
                    model=model.manifest.model,
                    grids=tuple(half[row] for half in halves),
                )
        return [detection for detection in detections if detection is not None]

    async def _load(self, category: str) -> ResidentModel | Refusal | Deferral:
        """Load the version of a category that is not resident; waits for that no longer than `_LOAD_S`."""
        if self._away:  # until `_refresh_for_ever` finds the registry again
            return _defer(category, self._away)
        load = self._loads.get(category)
        if load is None:
            load = self._loads[category] = asyncio.create_task(self._load_now(category))
            load.add_done_callback(lambda _: self._loads.pop(category))
        try:
            async with asyncio.timeout(_LOAD_S):
                return await asyncio.shield(load)
        except TimeoutError:
            return _defer(category, f"it was not loaded within {_LOAD_S:g} s; loading goes on")

    async def _load_now(self, category: str) -> ResidentModel | Refusal | Deferral:
        async with self._loading:
            model = self._store.get(category)
            if model is not None or self._away:
                return model or _defer(category, self._away)
            try:
                # at most one look at the registry per refresh_s, even if every image has an unknown category
                if time.monotonic() - self._refreshed_at_s >= self._settings.refresh_s:
                    await self._refresh()
                if category not in self._store.known:
                    return _refuse(category, self._store.known)
                return await asyncio.to_thread(self._store.load, category)
            except UnknownCategoryError:
                return _refuse(category, self._store.known)
            except (RegistryError, ModelUnavailableError, StorageUnavailableError) as error:
                return _defer(category, error)

    async def _refresh(self) -> None:
        try:
            await asyncio.to_thread(self._store.refresh)
        except StorageUnavailableError as error:
            self._note_away(error)
            raise
        else:
            self._away = ""
            self._metrics.set(m.REGISTRY_UP, 1)
        finally:
            self._refreshed_at_s = time.monotonic()

    def _note_away(self, error: StorageUnavailableError) -> None:
        """Note that the registry is away; logged at most every `LOG_S`."""
        self._away = str(error)  # the error itself would keep the models of its traceback in memory
        self._metrics.set(m.REGISTRY_UP, 0)
        if time.monotonic() - self._away_logged_s >= LOG_S:
            self._away_logged_s = time.monotonic()
            log.warning(
                "the registry is away; loaded versions keep serving, images of other categories stay pending: %s", error
            )

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.refresh_s)
            try:
                async with self._loading:
                    await self._refresh()
            except StorageUnavailableError:  # logged
                continue
            except TransientError:  # of an engine on another machine
                log.exception("cannot look for new versions or load them; the loaded ones keep serving")

    def _preload(self) -> None:
        try:
            self._load_what_fits()
        except StorageUnavailableError as error:
            self._note_away(error)

    def _load_what_fits(self) -> None:
        self._store.refresh()
        self._metrics.set(m.REGISTRY_UP, 1)
        for category in self._store.known:
            if not self._store.has_room:
                log.warning(
                    "%d categories do not all fit in detector.max_resident_mb; the rest are loaded on demand",
                    len(self._store.known),
                )
                break
            with contextlib.suppress(RegistryError):  # logged by the model store
                self._store.load(category)


def _refuse(category: str, known: dict[str, str]) -> Refusal:
    listed = ", ".join(sorted(known)[:10])
    return Refusal(
        Reason.UNKNOWN_CATEGORY,
        f"category {category!r} has no current model version; known: {listed}. "
        "Train it with `flawstream train`, or correct the producer",
    )


def _defer(category: str, error: object) -> Deferral:
    return Deferral(f"the current version of {category!r} cannot be used: {error}")


def make_detector(
    registry_root: str, model: ModelSettings, settings: DetectorSettings, metrics: Metrics = NO_METRICS
) -> DetectorService:
    """Build a detector with the backbone and input size of the current versions in the registry.

    Args:
        registry_root: A folder or an fsspec URL.
        model: The backbone if the registry is empty, and its weights if those of the versions came from a file.
        settings: Engine, batching, and the memory for loaded versions.
        metrics: Metrics to update.

    Raises:
        ConfigError: The engine is not installed, or the backbone does not exist.
        WeightsError: The backbone's weights cannot be loaded.
        RegistryError: All current versions are damaged, or they have several backbones.
        TransientError: The registry cannot be read, or the engine is on another machine and does not answer.
    """
    return open_detector(Registry(registry_root), model, settings, metrics)


def open_detector(
    registry: Registry,
    model: ModelSettings,
    settings: DetectorSettings,
    metrics: Metrics = NO_METRICS,
    *,
    threads: int = 0,
) -> DetectorService:
    """Build a detector for the current versions of a registry; see `make_detector`.

    Args:
        registry: The registry.
        model: As for `make_detector`.
        settings: As for `make_detector`.
        metrics: Metrics to update.
        threads: CPU threads of ncnn and OpenVINO; 0: all.
    """
    engine = open_engine(registry, model, settings, threads)
    return DetectorService(registry, engine, settings, metrics)


def open_engine(registry: Registry, model: ModelSettings, settings: DetectorSettings, threads: int = 0) -> Engine:
    """Create the engine for the current versions of a registry; see `open_detector`."""
    newest = newest_manifest(registry)

    def backbone() -> Backbone:
        return Backbone(model) if newest is None else open_backbone(registry, newest, model)

    engine = make_engine(settings, backbone, threads)
    quiet_torch(engine)
    return engine


def newest_manifest(registry: Registry) -> ModelManifest | None:
    """Return the newest current version, or None if there are no versions. Damaged versions are ignored.

    Raises:
        MixedBackbonesError: The current versions have several backbones.
        RegistryError: All current versions are damaged.
        StorageUnavailableError: The registry cannot be read.
    """
    manifests, damaged = registry.current_manifests()
    if damaged and not manifests:
        raise damaged[0]
    require_one_backbone(
        {manifest.category: manifest.backbone for manifest in manifests},
        f"the current versions in {registry.root} have several backbones",
        "promote versions with the same backbone (`flawstream models promote --other-backbone`), train the categories "
        "that have none, or delete a category's file `current` and serve it from another registry",
    )
    return max(manifests, key=lambda manifest: manifest.created_at, default=None)
