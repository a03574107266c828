"""What every `Detector` does: the fake, the detector itself, and the same behind a handle of Ray Serve."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from helpers.fakes import FakeDetector
from helpers.tiny_models import TinyEngine, write_version

from flawstream.engines.protocol import HeadRows, ScoredBatch
from flawstream.imaging.pixels import Pixels
from flawstream.registry.registry import Registry
from schemas.errors import DetectorOverloadedError, Reason, TransientError
from schemas.messages import Verdict
from schemas.settings import DetectorSettings
from serving.deployments import HandleDetector
from serving.detector import DetectorService
from workers.ports import Detection, Detector, Judgement, Refusal

pytestmark = pytest.mark.anyio

DARK, BRIGHT = 50, 220
"""Grey levels that are normal and anomalous to every detector here."""
KNOWN, UNKNOWN = "bottle", "nope"


class World(Protocol):
    """A detector that knows one category, and a way to make it busy."""

    detector: Detector

    def busy(self) -> AbstractAsyncContextManager[None]:
        """Have it refuse calls meanwhile."""
        ...


async def judge(detector: Detector, levels: Sequence[int], categories: Sequence[str] = ()) -> list[Judgement]:
    """Have images of one grey level each judged."""
    (form,) = await detector.pixel_forms([KNOWN])
    images = np.stack([np.full(form.shape, level, form.dtype) for level in levels])
    return list(await detector.detect(images, categories or [KNOWN] * len(levels)))


def assert_alike(one: Judgement, other: Judgement) -> None:
    assert isinstance(one, Detection)
    assert isinstance(other, Detection)
    assert (one.score, one.p_value, one.verdict, one.model) == (other.score, other.p_value, other.verdict, other.model)
    for a, b in zip(one.grids, other.grids, strict=True):
        np.testing.assert_array_equal(a, b)


class DetectorContract:
    """The law."""

    async def test_the_form_of_pixels_stays_the_same(self, world: World) -> None:
        forms = await world.detector.pixel_forms([KNOWN, KNOWN])
        assert list(forms) == [forms[0]] * 2
        assert list(await world.detector.pixel_forms([KNOWN])) == [forms[0]]

    async def test_an_unknown_category_has_a_form_too(self, world: World) -> None:
        assert len(await world.detector.pixel_forms([UNKNOWN, KNOWN])) == 2

    async def test_there_is_an_outcome_for_each_image_in_order(self, world: World) -> None:
        outcomes = await judge(world.detector, [BRIGHT, DARK, DARK, BRIGHT])
        verdicts = [outcome.verdict for outcome in outcomes if isinstance(outcome, Detection)]
        assert verdicts == [Verdict.ANOMALOUS, Verdict.NORMAL, Verdict.NORMAL, Verdict.ANOMALOUS]

    async def test_a_detection_agrees_with_itself(self, world: World) -> None:
        for outcome in await judge(world.detector, [DARK, BRIGHT]):
            assert isinstance(outcome, Detection)
            assert (outcome.verdict is Verdict.ANOMALOUS) == (outcome.score > outcome.threshold)
            assert 0 < outcome.p_value <= 1
            assert np.isfinite([outcome.score, outcome.threshold, outcome.pixel_threshold]).all()
            category, at, version = outcome.model.partition("@")
            assert (category, at, bool(version)) == (KNOWN, "@", True)
            assert outcome.grids
            for grid in outcome.grids:
                assert grid.dtype == np.float16
                assert grid.ndim == 2
                assert grid.size

    async def test_an_image_is_judged_alike_alone_and_among_others(self, world: World) -> None:
        together = await judge(world.detector, [BRIGHT, DARK, 100])
        for outcome, level in zip(together, [BRIGHT, DARK, 100], strict=True):
            (alone,) = await judge(world.detector, [level])
            assert_alike(outcome, alone)

    async def test_an_unknown_category_is_refused_and_its_neighbours_are_judged(self, world: World) -> None:
        first, refused, last = await judge(world.detector, [DARK, DARK, BRIGHT], [KNOWN, UNKNOWN, KNOWN])
        assert isinstance(refused, Refusal)
        assert refused.reason is Reason.UNKNOWN_CATEGORY
        assert refused.detail
        for outcome, level in ((first, DARK), (last, BRIGHT)):
            assert_alike(outcome, (await judge(world.detector, [level]))[0])

    async def test_calls_at_once_get_each_its_own(self, world: World) -> None:
        levels = [DARK, BRIGHT, 100, 0]
        alone = [(await judge(world.detector, [level]))[0] for level in levels]
        for outcomes, expected in zip(
            await asyncio.gather(*(judge(world.detector, [level]) for level in levels)), alone, strict=True
        ):
            assert_alike(outcomes[0], expected)

    async def test_images_are_left_as_they_came(self, world: World) -> None:
        (form,) = await world.detector.pixel_forms([KNOWN])
        images = np.full((2, *form.shape), DARK, form.dtype)
        await world.detector.detect(images, [KNOWN] * 2)
        assert (images == DARK).all()

    async def test_a_busy_one_raises_and_judges_the_same_images_later(self, world: World) -> None:
        async with world.busy():
            with pytest.raises(TransientError):
                await judge(world.detector, [DARK])
        (outcome,) = await judge(world.detector, [DARK])
        assert isinstance(outcome, Detection)


class FakeWorld:
    def __init__(self) -> None:
        self._fake = FakeDetector()
        self._fake.unknown[UNKNOWN] = Refusal(Reason.UNKNOWN_CATEGORY, "no version")
        self.detector: Detector = self._fake

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        self._fake.failures = [DetectorOverloadedError("full")]
        yield
        assert not self._fake.failures


class TestFakeDetector(DetectorContract):
    @pytest.fixture
    def world(self) -> World:
        return FakeWorld()


class HeldEngine(TinyEngine):
    """An engine that computes nothing while it is held."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()

    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        self.entered.set()
        self.free.wait()
        return super().detect(images, heads)


class ServiceWorld:
    """A detector that runs, seen through `view`."""

    def __init__(
        self, service: DetectorService, engine: HeldEngine, view: Callable[[DetectorService], Detector]
    ) -> None:
        self._service = service
        self._engine = engine
        self.detector = view(service)

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Hold one batch in the engine and let as many wait as may."""
        self._engine.entered.clear()
        self._engine.free.clear()
        calls = [asyncio.create_task(judge(self._service, [DARK]))]
        await asyncio.to_thread(self._engine.entered.wait)
        calls += [asyncio.create_task(judge(self._service, [DARK])) for _ in range(MOST_WAITING)]
        await asyncio.sleep(0)  # each runs until it waits for its outcome
        try:
            yield
        finally:
            self._engine.free.set()
            await asyncio.gather(*calls)


MOST_WAITING = 4


@asynccontextmanager
async def serving(root: Path, view: Callable[[DetectorService], Detector]) -> AsyncIterator[World]:
    registry, engine = Registry(str(root)), HeldEngine()
    write_version(registry, KNOWN)
    service = DetectorService(registry, engine, DetectorSettings(max_queue_images=MOST_WAITING, max_batch_images=1))
    await service.start()
    try:
        yield ServiceWorld(service, engine, view)
    finally:
        await service.stop()


class TestDetectorService(DetectorContract):
    @pytest.fixture
    async def world(self, tmp_path: Path) -> AsyncIterator[World]:
        async with serving(tmp_path, lambda service: service) as world:
            yield world


class Handle:
    """A handle of Ray Serve, as far as a caller sees it, to a detector of this process."""

    deployment_name = "Detector"

    def __init__(self, service: DetectorService) -> None:
        self._service = service

    def __getattr__(self, method: str) -> "Method":
        return Method(getattr(self._service, method))


class Method:
    def __init__(self, call: Callable[..., Awaitable[object]]) -> None:
        self._call = call

    def remote(self, *arguments: object) -> asyncio.Future[object]:
        return asyncio.ensure_future(self._call(*arguments))


class TestHandleDetector(DetectorContract):
    @pytest.fixture
    async def world(self, tmp_path: Path) -> AsyncIterator[World]:
        async with serving(tmp_path, lambda service: HandleDetector(Handle(service), 3600.0)) as world:
            yield world
