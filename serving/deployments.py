"""Ray Serve deployments of detector, stream worker and HTTP API: they start and stop the objects that do the work."""

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from flawstream.imaging.pixels import Depths, PixelForm, Pixels
from flawstream.registry.registry import Registry
from flawstream.telemetry.choose_tracer import open_tracer
from flawstream.telemetry.logs import set_up_logging
from schemas.errors import (
    ConfigError,
    DetectorDiedError,
    DetectorOverloadedError,
    FlawstreamError,
    StageTimeoutError,
    StreamUnavailableError,
)
from schemas.keys import all_keys
from schemas.settings import Settings
from serving.api.api import build_api
from serving.autoscaling import LoadReports
from serving.availability import wait_for_versions
from serving.detector import open_detector
from serving.ray_metrics import RayMetrics
from serving.routing import CATEGORIES_FIT, placement_of, split
from workers.consume.sharded import ShardedWorker
from workers.observe.backlog import Backlog
from workers.observe.stream_gauges import StreamGauges, report_for_ever
from workers.ports import Judgement
from workers.produce.producer import Producer
from workers.redis.client import require_server
from workers.redis.connection import make_client
from workers.redis.persistence import all_warnings, require_no_eviction

log = logging.getLogger(__name__)

_FORMS_S = 2.0
"""So long the form of a category's images is remembered: it changes with its backbone."""
_WATCHES = 20
"""So often within `detector.timeout_s` a replica looks whether it hangs."""
_NO_REPLICA = (BackPressureError, DeploymentUnavailableError, RequestCancelledError, RayActorError, ObjectLostError)


class HandleDetector:
    """Implements the `Detector` protocol with calls to a Serve handle.

    Args:
        handle: Handle of the `DetectorDeployment`.
        timeout_s: Timeout of a call.
    """

    def __init__(self, handle: DeploymentHandle, timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s
        self._forms: dict[str, PixelForm] = {}
        self._forms_since_s = -math.inf

    async def pixel_forms(self, categories: Sequence[str]) -> list[PixelForm]:
        """Return the form that images of each category must have; asked for again after `_FORMS_S`."""
        if time.monotonic() - self._forms_since_s > _FORMS_S:
            self._forms = {}
            self._forms_since_s = time.monotonic()
        forms = self._forms
        if missing := list({category for category in categories if category not in forms}):
            forms.update(zip(missing, await self._call("pixel_forms", missing), strict=True))
        return [forms[category] for category in categories]

    async def detect(
        self, images: Pixels, categories: Sequence[str], depths: Depths | None = None
    ) -> Sequence[Judgement]:
        """Judge a batch; see `workers.ports.Detector`.

        Where the categories do not all fit into one replica, each replica gets the images of its categories.

        Raises:
            DetectorOverloadedError: The queue is full, no replica is available, or none answered in time; nothing is
                returned even if some images were judged.
            DetectorDiedError: The replica died during the call.
        """
        calls = split(categories, placement_of(self._handle.deployment_name))
        depths = depths or [None] * len(images)
        if len(calls) == 1:
            return await self._detect(images, categories, depths)
        parts = [(images[rows], [categories[row] for row in rows], [depths[row] for row in rows]) for rows in calls]
        answers = await asyncio.gather(*(self._detect(*part) for part in parts), return_exceptions=True)
        judgements: dict[int, Judgement] = {}
        for rows, answer in zip(calls, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            judgements.update(zip(rows, answer, strict=True))
        return [judgements[row] for row in range(len(categories))]

    async def _detect(self, images: Pixels, categories: Sequence[str], depths: Depths) -> Sequence[Judgement]:
        try:
            outcomes: Sequence[Judgement] = await self._call("detect", images, list(categories), list(depths))
        except DetectorOverloadedError as error:
            if isinstance(error.__cause__, ActorDiedError):
                raise DetectorDiedError(f"a detector replica died during a call with {len(images)} images") from error
            raise
        return outcomes

    async def status(self) -> dict[str, object]:
        """Return the status of one detector replica."""
        status: dict[str, object] = await self._call("status")
        return status

    async def _call(self, method: str, *arguments: object) -> Any:
        response = getattr(self._handle, method).remote(*arguments)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await response
        except RayTaskError as error:  # its text is the replica's traceback; its cause is our error
            if isinstance(error.cause, FlawstreamError):
                raise error.cause from None
            raise
        except TimeoutError as error:
            response.cancel()
            raise DetectorOverloadedError(
                f"no detector replica answered within {self._timeout_s:g} s (detector.timeout_s); the batch is retried"
            ) from error
        except _NO_REPLICA as error:
            raise DetectorOverloadedError(
                f"no detector replica took the call ({_first_line(error)}); the batch is retried"
            ) from error


class DetectorDeployment:
    """Runs a `DetectorService`: the backbone and the heads of all categories."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        set_up_logging(settings.logging)
        metrics = RayMetrics(settings.metrics.max_categories)
        registry = Registry(settings.registry.root)
        await asyncio.to_thread(wait_for_versions, registry, metrics)
        self._service = open_detector(registry, settings.model, settings.detector, metrics)
        await self._service.start()
        self._client = make_client(settings.redis)  # only used with autoscaling
        backlog = Backlog(self._client, all_keys(settings.redis))
        self._load = LoadReports(backlog, lambda: self._service.work)
        self._watch = asyncio.create_task(self._end_where_it_hangs(settings.detector.timeout_s / _WATCHES))

    async def _end_where_it_hangs(self, every_s: float) -> None:
        """End the process once a batch hangs: Serve replaces the replica, and callers look for the image to blame."""
        while True:
            await asyncio.sleep(every_s)
            if self._service.hangs:
                log.error("a batch takes the engine nearly detector.timeout_s: the replica ends, to be replaced")
                logging.shutdown()
                os._exit(1)  # any other end waits for the engine's thread

    async def pixel_forms(self, categories: Sequence[str]) -> list[PixelForm]:
        """Return the form that images of each category must have."""
        return await self._service.pixel_forms(categories)

    async def detect(self, images: Pixels, categories: Sequence[str], depths: Depths) -> list[Judgement]:
        """Judge a batch; see `workers.ports.Detector`."""
        return await self._service.detect(images, categories, depths)

    async def status(self) -> dict[str, object]:
        """Return the status of the detector."""
        return self._service.status()

    async def record_routing_stats(self) -> dict[str, object]:
        """Report to the request router whether all categories fit into memory; Serve calls this now and then."""
        return {CATEGORIES_FIT: self._service.categories_fit}

    async def check_health(self) -> None:
        """Fail if a loop of the detector has ended, so that Serve replaces the replica."""
        if not self._service.alive:
            raise RuntimeError("a loop of the detector has ended")

    async def __del__(self) -> None:
        """Stop the loops before the process ends."""
        with contextlib.suppress(AttributeError):  # the constructor failed
            self._watch.cancel()
            await self._service.stop()
            await self._client.aclose()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report what arrives and what this replica can do; Serve calls this only with autoscaling."""
        return await self._load.make()


class StreamWorkerDeployment:
    """Runs a stream worker as a background task of the replica."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, detector: DeploymentHandle
    ) -> None:
        set_up_logging(settings.logging)
        self._exit = contextlib.ExitStack()
        self._client = make_client(settings.redis)
        await require_server(self._client)
        await require_no_eviction(self._client)
        make_worker = partial(
            ShardedWorker,
            self._client,
            detector=HandleDetector(detector, settings.detector.timeout_s),
            settings=settings,
            metrics=RayMetrics(settings.metrics.max_categories),
            tracer=self._exit.enter_context(open_tracer(settings.tracing)),
        )
        # A replica that replaces a dead one gets its rank, and so continues at once with what was pending for it.
        replica = serve.get_replica_context()
        consumer = f"{socket.gethostname()}-{replica.rank.rank}"
        self._worker = make_worker(consumer)
        try:
            await self._worker.take_name()
        except ConfigError:  # of a live one that Serve has given another rank since, or of another service
            await self._worker.close()
            self._worker = make_worker(f"{consumer}-{replica.replica_id.unique_id}")
            await self._worker.take_name()
        backlog = Backlog(self._client, all_keys(settings.redis))
        # one that has images waiting for it always works: it reads as long as it has a free slot
        self._load = LoadReports(backlog, lambda: (self._worker.stats.completed, time.monotonic()))
        self._stop = asyncio.Event()
        self._draining = False
        self._loop_task = asyncio.create_task(self._worker.run(self._stop))

    async def status(self) -> dict[str, object]:
        """Return the worker's counts."""
        await self.check_health()
        return self._worker.stats.as_dict()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report what arrives and what this replica can do; Serve calls this only with autoscaling."""
        return await self._load.make()

    async def check_health(self) -> None:
        """Fail if the worker's loop has ended unexpectedly, or because a stage hangs: Serve replaces the replica."""
        if self._loop_task.done() and not self._draining:
            raise RuntimeError(f"the worker's loop has ended: {self._loop_task}")

    async def drain(self) -> str:
        """Stop reading, finish the batches in flight, and release what is not finished in time.

        Returns:
            The consumer's name.
        """
        self._draining = True
        self._stop.set()
        with contextlib.suppress(asyncio.CancelledError, StageTimeoutError):
            await self._loop_task
        return self._worker.consumer

    async def __del__(self) -> None:
        """Finish the batches in flight."""
        with contextlib.suppress(AttributeError):  # the constructor failed
            await self.drain()
            await self._worker.close()
            await self._client.aclose()
            await asyncio.to_thread(self._exit.close)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@serve.ingress()
class ApiDeployment:
    """Runs the HTTP API of `serving.api.api`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, detector: DeploymentHandle, worker: DeploymentHandle | None
    ) -> None:
        set_up_logging(settings.logging)
        self._settings = settings
        self._detector = HandleDetector(detector, settings.detector.timeout_s)
        self._worker = worker
        metrics = RayMetrics(settings.metrics.max_categories)
        self._exit = contextlib.ExitStack()
        tracer = self._exit.enter_context(open_tracer(settings.tracing))
        self._producer = Producer(settings.redis, settings.limits, settings.backlog, metrics, tracer=tracer)
        self._client = make_client(settings.redis)
        self._may_ask_server = True
        self._backlog = Backlog(self._client, all_keys(settings.redis))
        gauges = StreamGauges(self._backlog, metrics)  # reported here too, as there may be no worker
        self._reporting = asyncio.create_task(report_for_ever(settings.metrics.report_s, [gauges.report]))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the ASGI application; Serve calls this after the constructor."""
        return build_api(self._detector, self._producer, self._status, self._settings.api, self._settings.limits)

    async def _status(self) -> dict[str, object]:
        status: dict[str, object] = {"detector": await self._detector.status()}
        try:
            status["backlog"] = asdict(await self._backlog.read())
        except StreamUnavailableError:
            if self._worker is not None:
                raise
            status["backlog"] = None  # without workers the service does not need the streams
        if self._worker is not None:
            status["warnings"] = await self._warnings()
            status["worker"] = await self._worker.status.remote()
        return status

    async def _warnings(self) -> list[str]:
        """Return what the stream server may lose; it is not asked again where the user has no right to that.

        Raises:
            ConfigError: It evicts streams.
        """
        if not self._may_ask_server:
            return []
        servers = await require_no_eviction(self._client)
        self._may_ask_server = any(server.eviction for server in servers)
        return all_warnings(servers)

    async def __del__(self) -> None:
        """Close the connections."""
        with contextlib.suppress(AttributeError):  # the constructor failed
            self._reporting.cancel()
            await self._producer.close()
            await self._client.aclose()
            await asyncio.to_thread(self._exit.close)
