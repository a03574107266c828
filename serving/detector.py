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
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import Reason, RegistryError, ShapeError, TransientError, UnknownCategoryError
from schemas.manifest import ModelManifest
from schemas.messages import Verdict
from schemas.settings import DetectorSettings, ModelSettings
from serving.batching import DrainBatcher
from serving.model_store import ModelStore, ResidentModel
from workers.ports import Deferral, Detection, Judgement, Refusal

log = logging.getLogger(__name__)


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
        self._loading = asyncio.Lock()
        self._refreshed_at_s = -np.inf
        self._unreadable: RegistryError | None = None
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
        models: dict[str, ResidentModel | Refusal | Deferral] = {}
        for category in dict.fromkeys(categories):
            models[category] = self._store.get(category) or await self._load(category)
        outcomes: list[Judgement | None] = []
        rows: list[int] = []
        tags: list[ResidentModel] = []
        for row, category in enumerate(categories):
            model = models[category]
            if not isinstance(model, ResidentModel):
                outcomes.append(model)
                continue
            outcomes.append(None)
            rows.append(row)
            tags.append(model)
        detections = iter(await self._batcher.submit(images if len(rows) == len(images) else images[rows], tags))
        return [next(detections) if outcome is None else outcome for outcome in outcomes]

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
        """Load the version of a category that is not resident, without blocking batches of other categories."""
        async with self._loading:
            model = self._store.get(category)
            if model is not None:
                return model
            try:
                # at most one look at the registry per refresh_s, even if every image has an unknown category
                if time.monotonic() - self._refreshed_at_s >= self._settings.refresh_s:
                    await self._refresh()
                elif self._unreadable is not None:
                    return _defer(category, self._unreadable)
                if category not in self._store.known:
                    return _refuse(category, self._store.known)
                return await asyncio.to_thread(self._store.load, category)
            except UnknownCategoryError:
                return _refuse(category, self._store.known)
            except RegistryError as error:  # logged by the model store
                return _defer(category, error)

    async def _refresh(self) -> None:
        self._unreadable = None
        try:
            await asyncio.to_thread(self._store.refresh)
        except RegistryError as error:
            self._unreadable = error
            raise
        finally:
            self._refreshed_at_s = time.monotonic()

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.refresh_s)
            try:
                async with self._loading:
                    await self._refresh()
            except (RegistryError, TransientError):  # TransientError: of an engine on another machine
                log.exception("cannot look for new versions or load them; the loaded ones keep serving")

    def _preload(self) -> None:
        self._store.refresh()
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
    listed = ", ".join(sorted(known)[:10]) or "none yet"
    return Refusal(
        Reason.UNKNOWN_CATEGORY,
        f"category {category!r} has no current model version; known: {listed}. "
        "Train it with `flawstream train`, or correct the producer",
    )


def _defer(category: str, error: RegistryError) -> Deferral:
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
        RegistryError: The registry or all its current versions cannot be read, or these have several backbones.
        TransientError: The engine is on another machine and does not answer.
    """
    registry = Registry(registry_root)
    newest = newest_manifest(registry)

    def backbone() -> Backbone:
        return Backbone(model) if newest is None else open_backbone(registry, newest, model)

    engine = make_engine(settings, backbone)
    quiet_torch(engine)
    return DetectorService(registry, engine, settings, metrics)


def newest_manifest(registry: Registry) -> ModelManifest | None:
    """Return the newest current version, or None if there are no versions. Damaged versions are ignored.

    Raises:
        MixedBackbonesError: The current versions have several backbones.
        RegistryError: The registry cannot be read, or all current versions are damaged.
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
