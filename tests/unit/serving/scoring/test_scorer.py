"""Images that are stored, scored by the worker's pipeline: what each becomes, and what ends a run."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from helpers.fakes import FakeClock, FakeReader, FakeSink, FakeStream, entry_id, image_entry, png
from helpers.tiny_models import TinyEngine, write_version
from soak import score as soak

from flawstream.engines.protocol import HeadRows, ScoredBatch
from flawstream.imaging.pixels import Pixels
from flawstream.registry.registry import Registry
from schemas.errors import ModelUnavailableError, Reason
from schemas.messages import DeadLetter, DetectionResult, MapCodec, Verdict
from schemas.settings import DetectorSettings, LimitSettings, Settings, WorkerSettings
from serving.detector import DetectorService
from serving.scoring.listing import ListedImage
from serving.scoring.scorer import PinnedRegistry, Scorer
from workers.consume.decode import Decoder
from workers.consume.worker import StreamWorker
from workers.ports import Entry, Refusal

pytestmark = pytest.mark.anyio

SETTINGS = Settings(
    worker=WorkerSettings(batch_size=4, in_flight=2, max_deliveries=2), limits=LimitSettings(max_image_bytes=2048)
)


@asynccontextmanager
async def scoring(registry: Registry, engine: TinyEngine | None = None) -> AsyncIterator[Scorer]:
    detector = DetectorService(registry, engine or TinyEngine(), DetectorSettings(refresh_s=0.01))
    await detector.start()
    scorer = Scorer(detector, SETTINGS, MapCodec.GRID_F16, threads=2)
    try:
        yield scorer
    finally:
        scorer.close()
        await detector.stop()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(str(tmp_path / "models"))
    write_version(registry, "bottle")
    return registry


def store(folder: Path, name: str, data: bytes, category: str = "bottle") -> ListedImage:
    (folder / name).write_bytes(data)
    return ListedImage(str(folder / name), category)


async def test_every_image_has_an_outcome_in_order(registry: Registry, tmp_path: Path) -> None:
    images = [store(tmp_path, f"{level}.png", png(level, (30, 40))) for level in range(0, 220, 10)]
    async with scoring(registry) as scorer:
        for _ in range(2):
            outcomes = await scorer.score(images)
            results = [outcome for outcome in outcomes if isinstance(outcome, DetectionResult)]
            assert [result.score for result in results] == pytest.approx([level / 100 for level in range(0, 220, 10)])
            assert [result.verdict for result in results] == ["normal"] * 20 + ["anomalous"] * 2
            assert {(result.model, result.image_shape, len(result.boxes)) for result in results[-2:]} == {
                ("bottle@v1", (30, 40), 1)
            }
            assert all(result.map.codec is MapCodec.GRID_F16 for result in results)


async def test_what_cannot_be_judged_is_refused_and_its_neighbours_are_judged(
    registry: Registry, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    refused = {
        store(tmp_path, "damaged.png", png()[:40]): Reason.UNDECODABLE,
        store(tmp_path, "empty.png", b""): Reason.UNDECODABLE,
        store(tmp_path, "text.png", b"no image"): Reason.UNDECODABLE,
        store(tmp_path, "large.png", png() + bytes(4096)): Reason.TOO_LARGE,
        store(tmp_path, "ghost.png", png(), "ghost"): Reason.UNKNOWN_CATEGORY,
        store(tmp_path, "none.png", png(), ""): Reason.MALFORMED,
        store(tmp_path, "odd.png", png(), "../etc"): Reason.MALFORMED,
        store(tmp_path, "bytes.png", png(), "\udcff"): Reason.MALFORMED,
        ListedImage(str(tmp_path / "absent.png"), "bottle"): Reason.UNAVAILABLE_REFERENCE,
        ListedImage(str(tmp_path / "folder.png"), "bottle"): Reason.UNAVAILABLE_REFERENCE,
        ListedImage(str(tmp_path / "pipe.png"), "bottle"): Reason.UNAVAILABLE_REFERENCE,
        ListedImage("/dev/zero", "bottle"): Reason.UNAVAILABLE_REFERENCE,
        ListedImage("http://169.254.169.254/latest", "bottle"): Reason.FORBIDDEN_REFERENCE,
        ListedImage("zip://a::file:///b.zip", "bottle"): Reason.FORBIDDEN_REFERENCE,
        ListedImage("/tmp/a\0b.png", "bottle"): Reason.FORBIDDEN_REFERENCE,  # noqa: S108 - never opened
        ListedImage("x" * 5000, "bottle"): Reason.UNAVAILABLE_REFERENCE,
    }
    good = store(tmp_path, "good.png", png())
    images = [each for image in refused for each in (image, good)]
    async with scoring(registry) as scorer:
        outcomes = await scorer.score(images)
    for image, outcome in zip(refused, outcomes[::2], strict=True):
        assert isinstance(outcome, Refusal), image
        assert outcome.reason is refused[image], (image, outcome)
    assert all(isinstance(outcome, DetectionResult) for outcome in outcomes[1::2])


async def test_promotion_changes_no_pinned_version(registry: Registry, tmp_path: Path) -> None:
    image = store(tmp_path, "a.png", png())
    pinned = PinnedRegistry(str(tmp_path / "models"), {"bottle": "v1"})
    write_version(registry, "bottle", "v2")
    write_version(registry, "cable")
    async with scoring(pinned) as scorer:
        await asyncio.sleep(0.05)  # some refreshes
        (outcome, other) = await scorer.score([image, image._replace(category="cable")])
    assert isinstance(outcome, DetectionResult)
    assert outcome.model == "bottle@v1"
    assert isinstance(other, Refusal)
    assert other.reason is Reason.UNKNOWN_CATEGORY


async def test_version_that_cannot_be_used_ends_the_run_with_the_reason(registry: Registry, tmp_path: Path) -> None:
    write_version(registry, "bottle", "v2", weights=b"no safetensors")
    images = [store(tmp_path, f"{number}.png", png()) for number in range(6)]
    async with scoring(registry) as scorer:
        with pytest.raises(ModelUnavailableError, match="'bottle' cannot be used"):
            await scorer.score(images)


def entries_of(images: Sequence[ListedImage]) -> list[Entry]:
    return [
        image_entry(number, category=image.category, image=Path(image.path).read_bytes())
        for number, image in enumerate(images)
    ]


async def test_scores_verdicts_boxes_and_maps_are_a_stream_worker_s_with_a_real_engine(tmp_path: Path) -> None:
    images = soak.write_images(tmp_path / "images", 48)
    await asyncio.to_thread(soak.write_versions, tmp_path / "models", images)
    detector = soak.open_detector(tmp_path / "models")
    await detector.start()
    stream, clock = FakeStream(), FakeClock()
    stream.add(*entries_of(images))
    worker_settings = WorkerSettings(map_codec=MapCodec.GRID_F16)
    decoder = Decoder(2, LimitSettings(), clock)
    worker = StreamWorker(FakeReader(stream), FakeSink(stream), detector, decoder, clock, settings=worker_settings)
    while await worker.run_once():
        pass
    decoder.close()
    published = {completion.entry_id: completion.outcome for completion in stream.ended}
    scorer = Scorer(detector, Settings(), MapCodec.GRID_F16, threads=2)
    outcomes = await scorer.score(images)
    scorer.close()
    await detector.stop()
    for number, (image, outcome) in enumerate(zip(images, outcomes, strict=True)):
        streamed = published[entry_id(number)]
        if isinstance(outcome, Refusal):
            assert isinstance(streamed, DeadLetter)
            assert (outcome.reason, outcome.detail) == (streamed.reason, streamed.detail), image
        else:
            assert isinstance(streamed, DetectionResult)
            assert streamed.model_copy(update=_TIMES) == outcome.model_copy(update=_TIMES), image
    verdicts = Counter(outcome.verdict for outcome in outcomes if isinstance(outcome, DetectionResult))
    assert verdicts[Verdict.NORMAL]
    assert verdicts[Verdict.ANOMALOUS]
    assert sum(isinstance(outcome, Refusal) for outcome in outcomes) == 1


_TIMES = {"id": "0", "queued_ms": 0.0, "decode_ms": 0.0, "detect_ms": 0.0, "total_ms": 0.0}


class FailingEngine(TinyEngine):
    """Fails for one grey level as no engine should."""

    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        if (images == 66).all(axis=(1, 2, 3)).any():
            raise ZeroDivisionError
        return super().detect(images, heads)


async def test_image_for_which_the_engine_fails_is_poison(registry: Registry, tmp_path: Path) -> None:
    images = [store(tmp_path, f"{level}.png", png(level)) for level in (60, 66, 70)]
    async with scoring(registry, FailingEngine()) as scorer:
        first, second, third = await scorer.score(images)
    assert isinstance(second, Refusal)
    assert second.reason is Reason.POISON
    assert isinstance(first, DetectionResult)
    assert isinstance(third, DetectionResult)
