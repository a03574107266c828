"""The detector: engines, loaded versions and batching behind the `Detector` protocol. Knows no Ray.

Shape legend: B images, S side of an image in pixels, H W height and width of a scale's grid.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

import numpy as np

from flawstream.calibration import is_anomalous, p_values
from flawstream.engines.protocol import Engine, HeadRows
from flawstream.imaging.maps import published_grid
from flawstream.imaging.pixels import Depths, PixelForm, Pixels
from flawstream.registry.registry import Registry
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
from schemas.messages import Verdict
from schemas.settings import BitDepth, DetectorSettings, ModelSettings
from serving.availability import LOG_S
from serving.batching import DrainBatcher
from serving.engines import Engines, open_engines
from serving.model_store import ModelStore, ResidentModel
from workers.ports import Deferral, Detection, Judgement, Refusal

log = logging.getLogger(__name__)

_LOAD_S = 10.0
"""Longest wait of a call for a version that is not loaded; then its images are deferred, and loading goes on."""

_HANGS_SHARE = 0.9
"""Of `detector.timeout_s`; then a batch hangs. Its caller, who would soon give up, learns that it was lost."""


class DetectorService:
    """Judges images of any mix of categories (`workers.ports.Detector`).

    Args:
        registry: Registry of the model versions.
        engines: The engine that runs them, or one for each backbone.
        settings: Batching, and the memory for loaded versions.
        metrics: Metrics to update.
    """

    def __init__(
        self, registry: Registry, engines: Engines | Engine, settings: DetectorSettings, metrics: Metrics = NO_METRICS
    ) -> None:
        self._engines = engines if isinstance(engines, Engines) else Engines(engines)
        self._settings = settings
        self._store = ModelStore(registry, self._engines, settings.max_resident_mb * 1_000_000, metrics)
        self._batcher = DrainBatcher(
            self._judge,
            group=lambda model: model.engine.spec.identity,
            concurrent_batches=self._engines.first.concurrent_batches,
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
        """Load the current versions, warm the engines up, then start the batcher and the search for new versions."""
        await asyncio.to_thread(self._preload)
        await asyncio.to_thread(self._engines.warm_up)
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
        """Whether the engines are usable, and the batcher and the refresh task run."""
        refreshes = self._refresh_task is not None and not self._refresh_task.done()
        return self._engines.usable and self._batcher.alive and refreshes

    @property
    def hangs(self) -> bool:
        """Whether a batch has run for so long that the engine hangs: no thread can be ended, but the process can."""
        return self._batcher.longest_run_s > self._settings.timeout_s * _HANGS_SHARE

    def status(self) -> dict[str, object]:
        """Return engine, backbones, loaded versions and counts."""
        first = self._engines.first
        return {
            "engine": type(first).__name__.removesuffix("Engine").lower(),
            "backbone": first.spec.name,
            "input_size": first.spec.input_size,
            "other_backbones": [engine.spec.summary for engine in self._engines.opened[1:]],
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

    async def pixel_forms(self, categories: Sequence[str]) -> list[PixelForm]:
        """Return the form that images of each category must have: that of its version."""
        return [self._store.form_of(category) for category in categories]

    async def detect(self, images: Pixels, categories: Sequence[str], depths: Depths | None = None) -> list[Judgement]:
        """Judge a batch.

        Args:
            images: (B, S, S, 3), of the form that `pixel_forms` returns for each of the categories.
            categories: The B images' categories.
            depths: By how many bits each was read, if its file has 16.

        Returns:
            For each image in order: a detection; a refusal if its category is unknown; or a deferral if the category's
            current version cannot be used, or has moved to one that takes images of another form since.

        Raises:
            DetectorOverloadedError: The queue is full; nothing was judged.
            ShapeError: The images have a size or dtype that no backbone takes.
        """
        self._require_a_form(images, len(categories))
        resident = self._store.get_all(categories)
        tags = [resident[category] for category in categories if category in resident]
        depths = depths or [None] * len(images)
        taken = all(_takes(model, images) for model in resident.values())
        if taken and len(tags) == len(images) and all(map(_reads_as, tags, depths)):
            return list(await self._batcher.submit(images, tags))
        rows = [row for row, category in enumerate(categories) if category in resident]
        missing: dict[str, list[int]] = {}
        for row, category in enumerate(categories):
            if category not in resident:
                missing.setdefault(category, []).append(row)
        parts = [
            self._judge_rows(images, rows, tags, depths),
            *(self._load_and_judge(images, rows, category, depths) for category, rows in missing.items()),
        ]
        del resident, tags  # loading another version may have to wait until no call uses these
        judgements: dict[int, Judgement] = {}
        for part in await asyncio.gather(*parts, return_exceptions=True):
            if isinstance(part, BaseException):
                raise part
            judgements |= part
        return [judgements[row] for row in range(len(images))]

    def _require_a_form(self, images: Pixels, count: int) -> None:
        """Refuse images of a shape that no version takes."""
        forms = self._store.forms
        if images.shape[:1] != (count,) or not any(_have_form(images, form) for form in forms):
            shapes = " or ".join(f"{(count, *form.shape)} {form.dtype}" for form in forms)
            raise ShapeError(f"expected {shapes}, got {images.shape} {images.dtype}")

    async def _judge_rows(
        self,
        images: Pixels,
        rows: Sequence[int],
        tags: Sequence[ResidentModel],
        depths: Depths,
    ) -> dict[int, Judgement]:
        judgements: dict[int, Judgement] = {
            row: _defer(model.manifest.category, "it has moved to a version that takes images of another form")
            for row, model in zip(rows, tags, strict=True)
            if not (_takes(model, images) and _reads_as(model, depths[row]))
        }
        fitting = [(row, model) for row, model in zip(rows, tags, strict=True) if row not in judgements]
        rows, tags = [row for row, _ in fitting], [model for _, model in fitting]
        return judgements | dict(zip(rows, await self._batcher.submit(images[rows], tags), strict=True))

    async def _load_and_judge(
        self, images: Pixels, rows: Sequence[int], category: str, depths: Depths
    ) -> dict[int, Judgement]:
        """Judge the rows of a category that is not loaded: apart from the others, which need not wait for it."""
        model = await self._load(category)
        if not isinstance(model, ResidentModel):
            return dict.fromkeys(rows, model)
        return await self._judge_rows(images, rows, [model] * len(rows), depths)

    def _judge(self, images: Pixels, models: Sequence[ResidentModel]) -> list[Detection]:
        """Judge one batch of versions on one backbone; called in a thread of the batcher."""
        rows_of: dict[ResidentModel, list[int]] = {}
        for row, model in enumerate(models):
            rows_of.setdefault(model, []).append(row)
        heads = [
            HeadRows(model.loaded, np.array(rows, np.int64), model.calibration.top_fraction)
            for model, rows in rows_of.items()
        ]
        scored = models[0].engine.detect(images, heads)
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


def _takes(model: ResidentModel, images: Pixels) -> bool:
    """Return whether images have the form of a version's backbone."""
    return _have_form(images, PixelForm.of(model.engine.spec))


def _reads_as(model: ResidentModel, depth: BitDepth | None) -> bool:
    """Return whether a version reads files of 16 bits as an image was read; None: its file has eight."""
    return depth in (None, model.manifest.bit_depth)


def _have_form(images: Pixels, form: PixelForm) -> bool:
    return images.shape[1:] == form.shape and images.dtype == form.dtype


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
    """Build a detector for the current versions in the registry, with an engine for each of their backbones.

    Args:
        registry_root: A folder or an fsspec URL.
        model: The backbone if the registry is empty, and its weights if those of the versions came from a file.
        settings: Engine, batching, and the memory for loaded versions.
        metrics: Metrics to update.

    Raises:
        ConfigError: The engine is not installed, or the backbone does not exist.
        WeightsError: The backbone's weights cannot be loaded.
        RegistryError: All current versions are damaged.
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
    return DetectorService(registry, open_engines(registry, model, settings, threads), settings, metrics)
