"""Thin Ray Serve shells: they start and stop what does the work and know nothing of how it is done."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from flawstream.imaging.pixels import PixelForm, Pixels
from flawstream.telemetry.choose_tracer import open_tracer
from flawstream.telemetry.logs import set_up_logging
from schemas.errors import DetectorDiedError, DetectorOverloadedError, FlawstreamError, StreamUnavailableError
from schemas.keys import all_keys
from schemas.settings import Settings
from serving.api.api import build_api
from serving.autoscaling import autoscaling_stats
from serving.detector import make_detector
from serving.ray_metrics import RayMetrics
from workers.consume.sharded import ShardedWorker
from workers.observe.backlog import Backlog
from workers.observe.stream_gauges import StreamGauges, report_for_ever
from workers.ports import Judgement
from workers.produce.producer import Producer
from workers.redis.client import require_server
from workers.redis.connection import make_client

log = logging.getLogger(__name__)

_NO_REPLICA = (BackPressureError, DeploymentUnavailableError, RequestCancelledError, RayActorError, ObjectLostError)


class HandleDetector:
    """A detector behind a Serve handle, as the `Detector` protocol.

    Args:
        handle: Of the `DetectorDeployment`.
        timeout_s: Longest wait for an answer.
    """

    def __init__(self, handle: DeploymentHandle, timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s
        self._pixel_form: PixelForm | None = None

    async def pixel_form(self) -> PixelForm:
        """Return the form that images must have. Asked once: another one comes with a new deployment only."""
        if self._pixel_form is None:
            self._pixel_form = await self._call("pixel_form")
        return self._pixel_form

    async def detect(self, images: Pixels, categories: Sequence[str]) -> Sequence[Judgement]:
        """Judge a batch; see `workers.ports.Detector`.

        Raises:
            DetectorOverloadedError: The queue is full, no replica is there, or none answered in time; nothing of what
                was judged comes back.
            DetectorDiedError: The replica ended while it had the call.
        """
        try:
            outcomes: Sequence[Judgement] = await self._call("detect", images, list(categories))
        except DetectorOverloadedError as error:
            if isinstance(error.__cause__, ActorDiedError):
                raise DetectorDiedError(f"a detector replica ended while it had {len(images)} images") from error
            raise
        return outcomes

    async def status(self) -> dict[str, object]:
        """Tell what is loaded and how it goes."""
        told: dict[str, object] = await self._call("status")
        return told

    async def _call(self, method: str, *arguments: object) -> Any:
        response = getattr(self._handle, method).remote(*arguments)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await response
        except RayTaskError as error:  # its own text is the traceback in the replica
            if isinstance(error.cause, FlawstreamError):
                raise error.cause from None
            raise
        except TimeoutError as error:
            response.cancel()
            raise DetectorOverloadedError(
                f"no detector replica answered within {self._timeout_s:g} s (detector.timeout_s); it is tried again"
            ) from error
        except _NO_REPLICA as error:
            raise DetectorOverloadedError(
                f"no detector replica took the call ({_first_line(error)}); it is tried again"
            ) from error


class DetectorDeployment:
    """Hosts a `DetectorService`: the backbone and the heads of all categories."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        set_up_logging(settings.logging)
        metrics = RayMetrics(settings.metrics.max_categories)
        self._service = make_detector(settings.registry.root, settings.model, settings.detector, metrics)
        await self._service.start()
        self._client = make_client(settings.redis)  # used where the number of replicas follows the backlog
        self._backlog = Backlog(self._client, all_keys(settings.redis))

    async def pixel_form(self) -> PixelForm:
        """Return the form that images must have."""
        return await self._service.pixel_form()

    async def detect(self, images: Pixels, categories: Sequence[str]) -> list[Judgement]:
        """Judge a batch; see `workers.ports.Detector`."""
        return await self._service.detect(images, categories)

    async def status(self) -> dict[str, object]:
        """Tell what is loaded and how it goes."""
        return self._service.status()

    async def check_health(self) -> None:
        """Have Serve replace a replica whose loops ended."""
        if not self._service.alive:
            raise RuntimeError("a loop of the detector has ended")

    async def __del__(self) -> None:
        """Stop the loops before the process goes."""
        with contextlib.suppress(AttributeError):  # the constructor failed
            await self._service.stop()
            await self._client.aclose()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report what waits; Serve asks only where it scales."""
        return await autoscaling_stats(self._backlog)


class StreamWorkerDeployment:
    """Hosts a `StreamWorker` as a background loop of the replica."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, detector: DeploymentHandle
    ) -> None:
        set_up_logging(settings.logging)
        self._exit = contextlib.ExitStack()
        self._client = make_client(settings.redis)
        await require_server(self._client)
        # A replica that takes the place of one that died has its rank, and so takes up at once what that one had.
        consumer = f"{socket.gethostname()}-{serve.get_replica_context().rank.rank}"
        self._worker = ShardedWorker(
            self._client,
            consumer,
            HandleDetector(detector, settings.detector.timeout_s),
            settings,
            RayMetrics(settings.metrics.max_categories),
            tracer=self._exit.enter_context(open_tracer(settings.tracing)),
        )
        self._backlog = Backlog(self._client, all_keys(settings.redis))
        self._stop = asyncio.Event()
        self._loop_task = asyncio.create_task(self._worker.run(self._stop))

    async def status(self) -> dict[str, object]:
        """Tell what the loop has done so far."""
        await self.check_health()
        return self._worker.stats.as_dict()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report what waits; Serve asks only where it scales."""
        return await autoscaling_stats(self._backlog)

    async def check_health(self) -> None:
        """Have Serve replace a replica whose loop ended unasked."""
        if self._loop_task.done() and not self._stop.is_set():
            raise RuntimeError(f"the worker's loop has ended: {self._loop_task}")

    async def drain(self) -> str:
        """Finish the batches under way and read no more; what is not finished in time is handed back.

        Returns:
            Which replica it was.
        """
        self._stop.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self._loop_task
        return self._worker.consumer

    async def __del__(self) -> None:
        """Finish the batches under way."""
        with contextlib.suppress(AttributeError):  # the constructor failed
            await self.drain()
            await self._worker.close()
            await self._client.aclose()
            await asyncio.to_thread(self._exit.close)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@serve.ingress()
class ApiDeployment:
    """Hosts the HTTP API; what it answers is defined in `serving.api.api`."""

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
        self._backlog = Backlog(self._client, all_keys(settings.redis))
        gauges = StreamGauges(self._backlog, metrics)  # they must be told while no worker lives
        self._reporting = asyncio.create_task(report_for_ever(settings.metrics.report_s, [gauges.report]))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Give Serve the application, once the handles are here."""
        return build_api(self._detector, self._producer, self._status, self._settings.api, self._settings.limits)

    async def _status(self) -> dict[str, object]:
        told: dict[str, object] = {"detector": await self._detector.status()}
        try:
            told["backlog"] = asdict(await self._backlog.read())
        except StreamUnavailableError:
            if self._worker is not None:
                raise
            told["backlog"] = None  # nobody here needs the streams; images are judged all the same
        if self._worker is not None:
            told["worker"] = await self._worker.status.remote()
        return told

    async def __del__(self) -> None:
        """Close the connections."""
        with contextlib.suppress(AttributeError):  # the constructor failed
            self._reporting.cancel()
            await self._producer.close()
            await self._client.aclose()
            await asyncio.to_thread(self._exit.close)
