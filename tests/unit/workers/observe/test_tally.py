"""The numbers of a worker's loop, a producer, a detector and training, on the real prometheus-client."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.fakes import (
    FakeClock,
    FakeDetector,
    FakeReader,
    FakeSink,
    FakeStream,
    image_entry,
    png,
)
from helpers.scraped import Scraped, collected
from prometheus_client import CollectorRegistry

from flawstream.telemetry import metrics as m
from flawstream.telemetry.prometheus import PrometheusMetrics
from schemas.errors import DetectorOverloadedError, Reason, StreamUnavailableError
from schemas.settings import LimitSettings, WorkerSettings
from serving.batching import DrainBatcher
from training.pipeline import Progress, Stage
from training.progress_metrics import record_progress
from workers.consume.decode import Decoder
from workers.consume.worker import StreamWorker
from workers.observe.backlog import BacklogState
from workers.observe.drift import DriftMonitor
from workers.observe.stream_gauges import StreamGauges
from workers.observe.tally import Tally
from workers.ports import Deferral, Refusal

pytestmark = pytest.mark.anyio


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> PrometheusMetrics:
    return PrometheusMetrics(registry, max_categories=10)


@pytest.fixture
def scraped(registry: CollectorRegistry) -> Callable[[], Scraped]:
    return lambda: collected(registry)


class Rig:
    """A worker on fakes whose numbers are recorded."""

    def __init__(self, metrics: PrometheusMetrics) -> None:
        self.clock = FakeClock()
        self.stream = FakeStream(self.clock)
        self.detector = FakeDetector()
        self.sink = FakeSink(self.stream)
        self.worker = StreamWorker(
            FakeReader(self.stream),
            self.sink,
            self.detector,
            Decoder(1, LimitSettings(), self.clock),
            self.clock,
            settings=WorkerSettings(),
            tally=Tally(metrics, DriftMonitor(metrics, window_images=20, max_categories=10)),
        )


async def test_every_image_is_counted_by_how_it_ended(
    metrics: PrometheusMetrics, scraped: Callable[[], Scraped]
) -> None:
    rig = Rig(metrics)
    rig.detector.unknown = {"ghost": Refusal(Reason.UNKNOWN_CATEGORY, "nobody")}
    rig.stream.add(*(image_entry(number, image=png(50)) for number in range(3)))
    rig.stream.add(image_entry(3, image=png(200)), image_entry(4, category="ghost"), image_entry(5, image=b"none"))
    rig.clock.advance(2)
    assert await rig.worker.run_once() == 6
    now = scraped()
    assert now.total(m.IMAGES.name) == 6
    assert now.total(m.RESULTS.name, category="bottle", verdict="normal") == 3
    assert now.total(m.RESULTS.name, category="bottle", verdict="anomalous") == 1
    assert now.total(m.DEAD_LETTERS.name, reason="unknown_category") == 1
    assert now.total(m.DEAD_LETTERS.name, reason="undecodable") == 1
    assert now.total(f"{m.P_VALUE.name}_count", category="bottle") == 4
    assert now.total(f"{m.IMAGE_SECONDS.name}_sum") == pytest.approx(4 * 2.0)
    assert now.total(f"{m.BATCH_IMAGES.name}_sum", stage="read") == 6
    assert now.total(f"{m.STAGE_SECONDS.name}_sum", stage="queue") == pytest.approx(2.0)
    for stage in ("read", "queue", "decode", "call", "encode", "publish"):
        assert now.total(f"{m.STAGE_SECONDS.name}_count", stage=stage) == 1


async def test_retries_are_counted_by_cause_and_bugs_as_errors(
    metrics: PrometheusMetrics, scraped: Callable[[], Scraped]
) -> None:
    rig = Rig(metrics)
    rig.detector.failures = [DetectorOverloadedError("full"), ValueError("a bug")]
    rig.sink.failures = [StreamUnavailableError("away")]
    rig.stream.add(image_entry(0))
    assert await rig.worker.run_once() == 0  # the bug: it stays pending
    rig.stream.add(image_entry(1))
    assert await rig.worker.run_once() == 1
    assert scraped().total(m.RETRIES.name, cause="detector_overloaded") == 1
    assert scraped().total(m.RETRIES.name, cause="stream_unavailable") == 1
    assert scraped().total(m.ERRORS.name) == 1
    assert rig.worker.stats.retries == 2


async def test_images_that_wait_for_a_version_are_counted_as_retries_of_their_own_cause(
    metrics: PrometheusMetrics, scraped: Callable[[], Scraped]
) -> None:
    rig = Rig(metrics)
    rig.detector.unknown = {"cap": Deferral("its version cannot be used")}
    rig.stream.add(image_entry(0, category="cap"), image_entry(1, category="cap"), image_entry(2))
    assert await rig.worker.run_once() == 1
    assert scraped().total(m.RETRIES.name, cause="model_unavailable") == 2
    assert scraped().total(m.DEAD_LETTERS.name) == scraped().total(m.ERRORS.name) == 0


async def test_what_another_worker_has_ended_is_no_result_of_ours(
    metrics: PrometheusMetrics, scraped: Callable[[], Scraped]
) -> None:
    rig = Rig(metrics)
    rig.sink.lost_replies = [StreamUnavailableError("the reply was lost")]
    rig.stream.add(image_entry(0))
    assert await rig.worker.run_once() == 0
    assert scraped().total(m.NOT_OURS.name) == 1
    assert scraped().total(m.RESULTS.name) == 0


async def test_detector_tells_its_batches_its_queue_its_halvings_and_its_refusals(
    metrics: PrometheusMetrics, scraped: Callable[[], Scraped]
) -> None:
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def run(images: Any, tags: Any) -> list[str]:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        if len(images) == 4:
            raise MemoryError("too large")
        return list(tags)

    batcher: DrainBatcher[str, str] = DrainBatcher(run, max_batch_images=4, max_queue_images=4, metrics=metrics)
    batcher.start()
    calls = [asyncio.create_task(batcher.submit(np.zeros((4, 8, 8, 3), np.uint8), "abcd"))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the batcher has taken it
    calls.append(asyncio.create_task(batcher.submit(np.zeros((2, 8, 8, 3), np.uint8), "xy")))
    await asyncio.sleep(0)
    assert scraped().most(m.DETECTOR_QUEUE_IMAGES.name) == 2
    with pytest.raises(DetectorOverloadedError):
        await batcher.submit(np.zeros((3, 8, 8, 3), np.uint8), "nay")
    gate.set()
    assert await asyncio.gather(*calls) == [list("abcd"), list("xy")]
    await batcher.stop()
    now = scraped()
    assert now.most(m.DETECTOR_QUEUE_IMAGES.name) == 0
    assert now.total(m.DETECTOR_REFUSALS.name) == 1
    assert now.total(m.HALVINGS.name) == 1
    assert now.total(f"{m.BATCH_IMAGES.name}_count", stage="detect") == 2
    assert now.total(f"{m.BATCH_IMAGES.name}_sum", stage="detect") == 6
    assert now.total(f"{m.STAGE_SECONDS.name}_count", stage="wait") == 2
    assert now.total(f"{m.STAGE_SECONDS.name}_count", stage="detect") == 2


class _Backlog:
    """Tells what it is scraped to."""

    def __init__(self) -> None:
        self.state = BacklogState(5, 2, 3, 1.5, 7, 1, {"refused_images": 4})
        self.away = False

    async def read(self) -> BacklogState:
        if self.away:
            raise StreamUnavailableError("away")
        return self.state


async def test_streams_are_told_as_they_stand_and_events_only_grow(
    metrics: PrometheusMetrics, scraped: Callable[[], Scraped]
) -> None:
    backlog = _Backlog()
    gauges = StreamGauges(backlog, metrics)  # type: ignore[arg-type]  # it only reads
    await gauges.report()
    now = scraped()
    for metric, value in (
        (m.STREAM_UP, 1),
        (m.BACKLOG_IMAGES, 5),
        (m.PENDING_IMAGES, 2),
        (m.LAG_IMAGES, 3),
        (m.ORPHANED_IMAGES, 0),
        (m.OLDEST_IMAGE_SECONDS, 1.5),
        (m.STREAM_RESULTS, 7),
        (m.STREAM_DEAD_LETTERS, 1),
    ):
        assert now.most(metric.name) == value
    assert now.total(m.STREAM_EVENTS.name, event="refused_images") == 4
    backlog.state = BacklogState(0, 0, None, None, 7, 1, {"refused_images": 6})
    await gauges.report()
    assert scraped().total(m.STREAM_EVENTS.name, event="refused_images") == 6
    assert scraped().most(m.OLDEST_IMAGE_SECONDS.name) == 0
    backlog.state = BacklogState(0, 0, None, None, 0, 0, {"refused_images": 1})  # the server was emptied
    await gauges.report()
    assert scraped().total(m.STREAM_EVENTS.name, event="refused_images") == 7
    backlog.away = True
    await gauges.report()
    assert scraped().most(m.STREAM_UP.name) == 0


def test_training_tells_images_epoch_and_loss_and_how_each_job_ended(
    metrics: PrometheusMetrics, scraped: Callable[[], Scraped]
) -> None:
    reports = [
        Progress("bottle", Stage.FEATURES, 8, 16),
        Progress("bottle", Stage.FEATURES, 16, 16),
        Progress("cable", Stage.TRAINING, 8, 32, epoch=1, loss=2.0),
        Progress("cable", Stage.TRAINING, 24, 32, epoch=2, loss=1.5),
        Progress("bottle", Stage.FAILED, 0, 1, "no luck"),
    ]
    assert list(record_progress(reports, metrics)) == reports
    now = scraped()
    assert now.total(m.TRAINING_IMAGES.name, category="bottle", stage="features") == 16
    assert now.total(m.TRAINING_IMAGES.name, category="cable", stage="training") == 24
    assert now.most(m.TRAINING_EPOCH.name, category="cable") == 2
    assert now.most(m.TRAINING_LOSS.name, category="cable") == 1.5
    assert now.total(m.TRAINING_JOBS.name, outcome="failed") == 1


def test_training_reports_speed_and_time_left_and_counts_a_retry_from_its_start(
    metrics: PrometheusMetrics, scraped: Callable[[], Scraped]
) -> None:
    times_s = iter([0.0, 0.0, 2.0, 10.0, 10.0])
    reports = [
        Progress("cable", Stage.TRAINING, 10, 100, epoch=1, loss=2.0),
        Progress("cable", Stage.TRAINING, 50, 100, epoch=2, loss=1.5),
        Progress("cable", Stage.WAITING, 0, 1, "retry 1 of 3"),
        Progress("cable", Stage.TRAINING, 10, 100, epoch=1, loss=2.0),
    ]
    passed = record_progress(reports, metrics, lambda: next(times_s))
    next(passed)
    next(passed)
    assert scraped().most(m.TRAINING_SPEED.name, category="cable") == 20
    assert scraped().most(m.TRAINING_LEFT.name, category="cable") == 2.5
    assert next(passed).stage is Stage.WAITING
    assert scraped().total(m.TRAINING_SPEED.name) == 0
    next(passed)
    assert scraped().total(m.TRAINING_IMAGES.name, category="cable", stage="training") == 60
