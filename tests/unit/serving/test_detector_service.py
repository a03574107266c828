"""The detector as one plain object on a real registry, with an engine that a test can predict."""

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import (
    FALSE_ALARM_RATE,
    INFINITE,
    NOT_A_NUMBER,
    SPEC,
    TOO_LARGE,
    TinyEngine,
    image,
    write_version,
)
from helpers.waiting import Deadline, wait_until_async
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flawstream.engines.protocol import HeadRows, ScoredBatch
from flawstream.imaging.pixels import PixelForm, Pixels
from flawstream.registry.registry import Registry
from schemas.errors import ConfigError, Reason, RegistryError, ShapeError, StorageUnavailableError
from schemas.manifest import ModelManifest
from schemas.messages import Verdict
from schemas.settings import DetectorSettings
from serving.detector import DetectorService
from serving.engines import Engines, newest_manifest
from workers.ports import Deferral, Detection, Judgement, Refusal

pytestmark = pytest.mark.anyio

NEVER_S = 3600.0


class CountingRegistry(Registry):
    """Counts how often all aliases are looked up."""

    lookups = 0

    def currents(self) -> dict[str, str]:
        self.lookups += 1
        return super().currents()


@pytest.fixture
def registry(tmp_path: Path) -> CountingRegistry:
    return CountingRegistry(str(tmp_path))


@asynccontextmanager
async def running(
    registry: Registry,
    *,
    engine: TinyEngine | Engines | None = None,
    model_bytes: int | None = None,
    refresh_s: float = NEVER_S,
    max_resident_mb: int = 100,
    max_batch_images: int = 32,
) -> AsyncIterator[DetectorService]:
    chosen = DetectorSettings(refresh_s=refresh_s, max_resident_mb=max_resident_mb, max_batch_images=max_batch_images)
    engine = engine or TinyEngine()
    if model_bytes is not None and isinstance(engine, TinyEngine):
        engine.memory_of = lambda head: model_bytes  # type: ignore[method-assign]  # noqa: ARG005 - the protocol's name
    service = DetectorService(registry, engine, chosen)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def judge(service: DetectorService, levels: Sequence[int], categories: Sequence[str]) -> list[Judgement]:
    return await service.detect(np.stack([image(level) for level in levels]), categories)


async def judge_one(service: DetectorService, level: int, category: str = "bottle") -> Detection:
    (outcome,) = await judge(service, [level], [category])
    assert isinstance(outcome, Detection), outcome
    return outcome


async def test_image_is_judged_by_its_category_s_current_version(registry: CountingRegistry) -> None:
    write_version(registry, "bottle")
    async with running(registry) as service:
        outcome = await judge_one(service, 50)
        assert await service.pixel_forms(["bottle"]) == [PixelForm(SPEC.input_size)]
        alive = [service.alive]
    alive.append(service.alive)
    assert alive == [True, False]
    assert outcome.model == "bottle@v1"
    assert outcome.score == pytest.approx(0.5)
    assert outcome.verdict is Verdict.NORMAL
    assert [grid.shape for grid in outcome.grids] == [(4, 4), (2, 2)]
    assert all(grid.dtype == np.float16 for grid in outcome.grids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(levels=st.lists(st.integers(0, 252), min_size=1, max_size=20))
async def test_verdict_threshold_and_p_value_agree(tmp_path: Path, levels: list[int]) -> None:
    registry = Registry(str(tmp_path))
    if not registry.versions("bottle"):
        write_version(registry, "bottle")
    async with running(registry) as service:
        outcomes = await judge(service, levels, ["bottle"] * len(levels))
    for outcome in outcomes:
        assert isinstance(outcome, Detection)
        anomalous = outcome.verdict is Verdict.ANOMALOUS
        assert anomalous == (outcome.score > outcome.threshold) == (outcome.p_value <= FALSE_ALARM_RATE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(batch=st.lists(st.tuples(st.integers(0, 255), st.sampled_from(["bottle", "cable", "nope"])), min_size=1))
async def test_mixed_batch_equals_each_image_alone(tmp_path: Path, batch: list[tuple[int, str]]) -> None:
    registry = Registry(str(tmp_path))
    if not registry.versions("cable"):
        write_version(registry, "bottle")
        write_version(registry, "cable", scores=(0.5, 1.0, 1.5))
    async with running(registry, max_batch_images=7) as service:
        together = await judge(service, *zip(*batch, strict=True))
        alone = [(await judge(service, [level], [category]))[0] for level, category in batch]
    for (_, category), one, other in zip(batch, together, alone, strict=True):
        if not isinstance(one, Detection):
            assert one == other
            assert category == "nope"
            continue
        assert isinstance(other, Detection)
        assert one.model == f"{category}@v1"
        for a, b in zip(one.grids, other.grids, strict=True):
            np.testing.assert_array_equal(a, b)
        assert (one.score, one.p_value, one.verdict) == (other.score, other.p_value, other.verdict)


@pytest.mark.parametrize("level", [NOT_A_NUMBER, INFINITE, TOO_LARGE])
async def test_grid_that_is_no_number_never_passes_as_normal(registry: CountingRegistry, level: int) -> None:
    write_version(registry, "bottle")
    async with running(registry) as service:
        bad, good = await judge(service, [level, 10], ["bottle", "bottle"])
    assert isinstance(bad, Detection)
    assert bad.verdict is Verdict.ANOMALOUS
    assert np.isfinite(bad.score)
    assert all(np.isfinite(grid).all() for grid in bad.grids)
    assert bad.p_value <= FALSE_ALARM_RATE
    assert isinstance(good, Detection)
    assert good.verdict is Verdict.NORMAL


async def test_unknown_category_is_refused_and_its_neighbours_are_judged(registry: CountingRegistry) -> None:
    write_version(registry, "bottle")
    async with running(registry) as service:
        first, refused, last = await judge(service, [10, 20, 30], ["bottle", "nope", "bottle"])
    assert isinstance(refused, Refusal)
    assert refused.reason is Reason.UNKNOWN_CATEGORY
    assert "'nope'" in refused.detail
    assert "known: bottle" in refused.detail
    assert [outcome.score for outcome in (first, last) if isinstance(outcome, Detection)] == pytest.approx([0.1, 0.3])


async def test_unknown_category_does_not_read_the_registry_for_every_image(registry: CountingRegistry) -> None:
    write_version(registry, "bottle")
    async with running(registry) as service:
        await judge(service, [1], ["nope"])
        before = registry.lookups
        for number in range(20):
            await judge(service, [number], [f"nope-{number}"])
        assert registry.lookups == before


async def test_category_trained_later_is_judged_after_the_next_refresh(registry: CountingRegistry) -> None:
    async with running(registry, refresh_s=0.001) as service:
        (outcome,) = await judge(service, [1], ["bottle"])
        assert isinstance(outcome, Deferral)
        assert "nothing is trained yet" in outcome.detail
        write_version(registry, "bottle")
        deadline = Deadline("the category is known")
        while isinstance(outcome, Deferral):
            deadline.check()
            (outcome,) = await judge(service, [1], ["bottle"])
        assert isinstance(outcome, Detection)
        assert outcome.model == "bottle@v1"


async def test_promoted_version_is_swapped_in_while_images_come(registry: CountingRegistry) -> None:
    write_version(registry, "bottle", "v1")
    async with running(registry, refresh_s=0.001) as service:
        models = [(await judge_one(service, 10)).model]
        write_version(registry, "bottle", "v2")
        deadline = Deadline("version 2, then version 1")
        while models[-1] != "bottle@v2":
            deadline.check()
            models.append((await judge_one(service, 10)).model)
        registry.promote("bottle", "v1")
        while models[-1] != "bottle@v1":
            deadline.check()
            models.append((await judge_one(service, 10)).model)
    assert set(models) == {"bottle@v1", "bottle@v2"}


async def test_category_that_was_let_go_is_loaded_again(registry: CountingRegistry) -> None:
    for category in ("bottle", "cable"):
        write_version(registry, category)
    async with running(registry, max_resident_mb=1, model_bytes=1_000_000) as service:  # none has another beside it
        assert service.status()["resident"] == ["bottle@v1"]
        outcomes = await judge(service, [10, 20], ["bottle", "cable"])
        assert [outcome.model for outcome in outcomes if isinstance(outcome, Detection)] == ["bottle@v1", "cable@v1"]
        assert service.status()["resident"] == ["cable@v1"]
        assert (await judge_one(service, 10)).model == "bottle@v1"


async def test_damaged_version_is_deferred_and_other_categories_are_judged(registry: CountingRegistry) -> None:
    write_version(registry, "bottle")
    write_version(registry, "cable", weights=b"no safetensors")
    async with running(registry) as service:
        deferred, judged = await judge(service, [1, 2], ["cable", "bottle"])
        lookups = registry.lookups
        assert isinstance((await judge(service, [3], ["cable"]))[0], Deferral)
        assert registry.lookups == lookups
    assert isinstance(deferred, Deferral)
    assert "the current version of 'cable' cannot be used" in deferred.detail
    assert isinstance(judged, Detection)


OTHER = SPEC.model_copy(update={"name": "other"})


LARGE = SPEC.model_copy(update={"name": "large", "input_size": 96})


def two_backbones(opened: list[str]) -> Engines:
    """Give engines of which the second knows two networks, and notes what is opened."""

    def open_other(manifest: ModelManifest) -> TinyEngine:
        if manifest.backbone.name == "missing":
            raise ConfigError("timm has no network 'missing'")
        opened.append(manifest.backbone.name)
        return TinyEngine(manifest.backbone, factor=2.0)

    return Engines(TinyEngine(), open_other)


async def test_versions_on_several_backbones_are_judged_side_by_side(registry: CountingRegistry) -> None:
    for category, spec in {"bottle": SPEC, "cable": OTHER, "tile": LARGE}.items():
        write_version(registry, category, spec=spec)
    opened: list[str] = []
    async with running(registry, engine=two_backbones(opened)) as service:
        assert opened == ["other", "large"]
        assert await service.pixel_forms(["tile", "bottle", "cable"]) == [PixelForm(96), PixelForm(64), PixelForm(64)]
        judged = await judge(service, [10, 20, 30, 40], ["bottle", "cable", "cable", "bottle"])
        assert [round(one.score, 6) for one in judged if isinstance(one, Detection)] == [0.1, 0.4, 0.6, 0.4]
        (tile,) = await service.detect(image(30, 96)[np.newaxis], ["tile"])
        assert isinstance(tile, Detection)
        assert [grid.shape for grid in tile.grids] == [(6, 6), (3, 3)]
        assert service.status()["batches"] == 3  # of the two in one call, one for each backbone
        assert service.status()["other_backbones"] == [OTHER.summary, LARGE.summary]


async def test_category_moves_to_another_backbone_while_it_is_served(registry: CountingRegistry) -> None:
    write_version(registry, "bottle")
    write_version(registry, "cable")
    opened: list[str] = []
    async with running(registry, engine=two_backbones(opened), refresh_s=0.001) as service:
        write_version(registry, "cable", "v2", spec=LARGE)
        await wait_until_async(
            lambda: "cable@v2" in service.status()["resident"],  # type: ignore[operator]  # a list
            "the version on another backbone is loaded",
            every_s=0.001,
        )
        bottle, late = await judge(service, [10, 20], ["bottle", "cable"])  # decoded before that
        assert isinstance(bottle, Detection)
        assert isinstance(late, Deferral)
        assert "has moved to a version that takes images of another form" in late.detail
        assert await service.pixel_forms(["cable"]) == [PixelForm(96)]
        (cable,) = await service.detect(image(20, 96)[np.newaxis], ["cable"])
        assert isinstance(cable, Detection)
        assert cable.model == "cable@v2"
    assert opened == ["large"]


async def test_images_read_by_the_depth_of_the_version_before_are_deferred(registry: CountingRegistry) -> None:
    write_version(registry, "bottle", bit_depth=10)
    write_version(registry, "cable", bit_depth=12)
    async with running(registry, refresh_s=0.001) as service:
        forms = await service.pixel_forms(["bottle", "cable", "nope"])
        assert [form.bits for form in forms] == [10, 12, 16]
        write_version(registry, "bottle", "v2", bit_depth=12)
        await wait_until_async(
            lambda: "bottle@v2" in service.status()["resident"],  # type: ignore[operator]  # a list
            "the version of another depth is loaded",
            every_s=0.001,
        )
        assert [form.bits for form in await service.pixel_forms(["bottle"])] == [12]
        images = np.stack([image(level) for level in (10, 20, 30, 40)])
        late, eight_bits, bottle, cable = await service.detect(images, ["bottle"] * 3 + ["cable"], [10, None, 12, 12])
    assert isinstance(late, Deferral)
    assert "has moved to a version that takes images of another form" in late.detail
    assert [one.model for one in (eight_bits, bottle, cable) if isinstance(one, Detection)] == [
        "bottle@v2",
        "bottle@v2",
        "cable@v1",
    ]


async def test_version_whose_backbone_cannot_be_opened_is_deferred_alone(registry: CountingRegistry) -> None:
    missing = SPEC.model_copy(update={"name": "missing"})
    for category in ("bottle", "cable"):
        write_version(registry, category)
    write_version(registry, "tile", spec=missing)
    async with running(registry, engine=two_backbones([]), refresh_s=0.001) as service:
        write_version(registry, "cable", "v2", spec=missing)
        await wait_until_async(
            lambda: service.status()["categories"] == {"bottle": "v1", "cable": "v2", "tile": "v1"},
            "the detector has looked for versions again",
            every_s=0.001,
        )
        bottle, cable, tile = await judge(service, [10, 20, 30], ["bottle", "cable", "tile"])
        assert isinstance(bottle, Detection)
        assert isinstance(cable, Detection)
        assert cable.model == "cable@v1"  # it was loaded, and goes on
        assert isinstance(tile, Deferral)
        assert "tile@v1 runs on missing at 64 px" in tile.detail
        assert "timm has no network 'missing'" in tile.detail
        write_version(registry, "tile", "v3")
        deadline = Deadline("version 3 of the tile")
        while isinstance(tile, Deferral):
            deadline.check()
            (tile,) = await judge(service, [30], ["tile"])
        assert isinstance(tile, Detection)
        assert tile.model == "tile@v3"


async def test_registry_that_cannot_be_read_makes_no_category_unknown(
    registry: CountingRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(registry, "bottle")
    lookups = 0

    def currents() -> dict[str, str]:
        nonlocal lookups
        lookups += 1
        raise StorageUnavailableError("the storage fails")

    async with running(registry) as service:
        monkeypatch.setattr(registry, "currents", currents)
        service._refreshed_at_s = -np.inf  # noqa: SLF001 - as after a pause longer than refresh_s
        outcomes = [(await judge(service, [1], ["new"]))[0] for _ in range(5)]
        assert (await judge_one(service, 10)).model == "bottle@v1"
    assert all(isinstance(one, Deferral) and "the storage fails" in one.detail for one in outcomes)
    assert lookups == 1  # and not one for every image


async def test_registry_that_fails_leaves_the_loaded_versions_serving(
    registry: CountingRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(registry, "bottle")
    failed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def currents() -> dict[str, str]:
        loop.call_soon_threadsafe(failed.set)
        raise StorageUnavailableError("the storage fails")

    async with running(registry, refresh_s=0.001) as service:
        monkeypatch.setattr(registry, "currents", currents)
        await failed.wait()
        assert (await judge_one(service, 10)).model == "bottle@v1"
        assert service.alive


@pytest.mark.parametrize("left", ["an empty folder", "no folder"])
async def test_loaded_versions_serve_while_the_volume_is_away_and_no_other_image_is_refused(
    registry: CountingRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture, left: str
) -> None:
    volume, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    registry = CountingRegistry(str(volume))
    for category in ("bottle", "cable"):
        write_version(registry, category)
    async with running(registry, refresh_s=0.001, max_resident_mb=1, model_bytes=1_000_000) as service:
        assert service.status()["resident"] == ["bottle@v1"]
        caplog.clear()
        volume.rename(elsewhere)
        if left == "an empty folder":
            volume.mkdir()
        await wait_until_async(lambda: bool(caplog.records), "the detector has looked again", every_s=0.001)
        for _ in range(3):
            resident, known, new = await judge(service, [10, 20, 30], ["bottle", "cable", "new"])
            assert isinstance(resident, Detection)
            assert isinstance(known, Deferral)
            assert isinstance(new, Deferral)
        await asyncio.sleep(0.1)  # many looks at the registry
        assert ["away" in record.getMessage() for record in caplog.records] == [True]
        if volume.exists():
            volume.rmdir()
        elsewhere.rename(volume)
        deadline = Deadline("the volume is found again")
        while isinstance(new, Deferral):
            deadline.check()
            known, new = await judge(service, [20, 30], ["cable", "new"])
        assert isinstance(new, Refusal)
        assert isinstance((await judge(service, [20], ["cable"]))[0], Detection)


class Head:
    """A loaded head, which is in memory for as long as anybody has it."""


async def test_no_more_versions_are_in_memory_than_may_be_while_calls_of_many_categories_wait(
    registry: CountingRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    categories = [f"part-{number:02}" for number in range(24)]
    for category in categories:
        write_version(registry, category)
    engine = TinyEngine()
    loaded: weakref.WeakSet[Head] = weakref.WeakSet()
    most = 0

    def load(*_: object) -> Head:
        nonlocal most
        head = Head()
        loaded.add(head)
        most = max(most, len(loaded))
        return head

    def detect(images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        time.sleep(0.005)  # calls wait in the queue
        return TinyEngine.detect(engine, images, heads)

    monkeypatch.setattr(engine, "load", load)
    monkeypatch.setattr(engine, "detect", detect)
    async with running(registry, engine=engine, max_resident_mb=4, model_bytes=1_000_000) as service:
        one_each = [judge(service, [10], [category]) for category in categories * 3]
        all_at_once = judge(service, [20] * len(categories), categories)
        outcomes = [outcome for part in await asyncio.gather(*one_each, all_at_once) for outcome in part]
        assert all(isinstance(outcome, Detection) for outcome in outcomes)
        assert service.status()["resident_mb"] <= 4.0  # type: ignore[operator]  # a number
    assert most == 4


@pytest.mark.parametrize(
    "images", [np.zeros((2, 64, 64, 3), np.uint8), np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 64, 64, 3))]
)
async def test_images_of_another_shape_are_our_bug(registry: CountingRegistry, images: np.ndarray) -> None:
    async with running(registry) as service:
        with pytest.raises(ShapeError, match=r"expected \(1, 64, 64, 3\) uint8"):
            await service.detect(images, ["bottle"])


async def test_status_counts_what_was_judged(registry: CountingRegistry) -> None:
    write_version(registry, "bottle")
    async with running(registry) as service:
        await judge(service, [1, 2, 3], ["bottle"] * 3)
        status = service.status()
    assert status["categories"] == {"bottle": "v1"}
    assert (status["batches"], status["images"], status["queued_images"]) == (1, 3, 0)
    assert (status["engine"], status["backbone"], status["input_size"]) == ("tiny", "tiny", 64)


def test_newest_current_version_names_the_backbone(registry: CountingRegistry) -> None:
    assert newest_manifest(registry) is None
    write_version(registry, "bottle", age=timedelta(days=2))
    write_version(registry, "cable", age=timedelta(days=1))
    newest = newest_manifest(registry)
    assert newest is not None
    assert newest.category == "cable"


def test_damaged_manifest_stops_no_other_category(registry: CountingRegistry, tmp_path: Path) -> None:
    write_version(registry, "bottle")
    (tmp_path / "bottle" / "v1" / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(RegistryError, match="damaged"):
        newest_manifest(registry)
    write_version(registry, "cable")
    newest = newest_manifest(registry)
    assert newest is not None
    assert newest.category == "cable"
