"""Thin Ray Serve shells: they start and stop what does the work and know nothing of how it is done."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from schemas.errors import DetectorOverloadedError
from schemas.keys import StreamKeys
from schemas.settings import Settings
from serving.api import build_api
from serving.detector import make_detector
from workers.clock import SystemClock
from workers.connection import make_client, require_server
from workers.consumer import StreamWorker
from workers.ports import Detection, Refusal
from workers.reader import RedisStreamReader
from workers.retention import RedisRetention
from workers.sink import RedisResultSink

log = logging.getLogger(__name__)

_DRAIN_S = 20.0


class HandleDetector:
    """A detector behind a Serve handle, as the `Detector` protocol.

    Args:
        handle: Of the `DetectorDeployment`.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def input_size(self) -> int:
        """Tell the side in pixels that images must have."""
        return int(await self._call("input_size"))

    async def detect(self, images: NDArray[np.uint8], categories: Sequence[str]) -> Sequence[Detection | Refusal]:
        """Judge a batch; see `workers.ports.Detector`.

        Raises:
            DetectorOverloadedError: The queue is full, or no replica is there; nothing was judged.
        """
        outcomes: Sequence[Detection | Refusal] = await self._call("detect", images, list(categories))
        return outcomes

    async def status(self) -> dict[str, object]:
        """Tell what is loaded and how it goes."""
        told: dict[str, object] = await self._call("status")
        return told

    async def _call(self, method: str, *arguments: object) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except (BackPressureError, DeploymentUnavailableError, RayActorError) as error:
            raise DetectorOverloadedError(f"no detector replica took the call ({error}); it is tried again") from error


class DetectorDeployment:
    """Hosts a `DetectorService`: the backbone and the heads of all categories."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._service = make_detector(settings.registry.root, settings.model, settings.detector)
        await self._service.start()

    async def input_size(self) -> int:
        """Tell the side in pixels that images must have."""
        return await self._service.input_size()

    async def detect(self, images: NDArray[np.uint8], categories: Sequence[str]) -> list[Detection | Refusal]:
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


class StreamWorkerDeployment:
    """Hosts a `StreamWorker` as a background loop of the replica."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, detector: DeploymentHandle
    ) -> None:
        self._client = make_client(settings.redis)
        await require_server(self._client)
        keys = StreamKeys(prefix=settings.redis.prefix)
        consumer = serve.get_replica_context().replica_id.unique_id
        self._worker = StreamWorker(
            RedisStreamReader(
                self._client,
                keys,
                consumer,
                settings.redis,
                claim_idle_ms=settings.worker.claim_idle_ms,
            ),
            RedisResultSink(self._client, keys, consumer),
            HandleDetector(detector),
            SystemClock(),
            settings=settings.worker,
            limits=settings.limits,
            retention=RedisRetention(self._client, keys, settings.backlog.keep_results),
        )
        self._stop = asyncio.Event()
        self._loop_task = asyncio.create_task(self._worker.run(self._stop))

    async def status(self) -> dict[str, object]:
        """Tell what the loop has done so far."""
        await self.check_health()
        return asdict(self._worker.stats)

    async def check_health(self) -> None:
        """Have Serve replace a replica whose loop ended."""
        if self._loop_task.done():
            raise RuntimeError(f"the worker's loop has ended: {self._loop_task}")

    async def __del__(self) -> None:
        """Finish the batches under way; what is not finished in time another worker claims."""
        with contextlib.suppress(AttributeError):  # the constructor failed
            self._stop.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._loop_task, _DRAIN_S)
            self._worker.close()
            await self._client.aclose()


@serve.ingress()
class ApiDeployment:
    """Hosts the HTTP API; what it answers is defined in `serving.api`."""

    def __init__(self, settings: Settings, detector: DeploymentHandle, worker: DeploymentHandle | None) -> None:
        self._limits = settings.limits
        self._detector = HandleDetector(detector)
        self._worker = worker

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Give Serve the application, once the handles are here."""
        return build_api(self._detector, self._status, self._limits)

    async def _status(self) -> dict[str, object]:
        told: dict[str, object] = {"detector": await self._detector.status()}
        if self._worker is not None:
            told["worker"] = await self._worker.status.remote()
        return told
