"""Thin Ray Serve shells: they start and stop what does the work and know nothing of how it is done."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from schemas.errors import DetectorOverloadedError, FlawstreamError
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
        self._input_size: int | None = None

    async def input_size(self) -> int:
        """Tell the side in pixels that images must have. Asked once: another one comes with a new deployment only."""
        if self._input_size is None:
            self._input_size = int(await self._call("input_size"))
        return self._input_size

    async def detect(self, images: NDArray[np.uint8], categories: Sequence[str]) -> Sequence[Detection | Refusal]:
        """Judge a batch; see `workers.ports.Detector`.

        Raises:
            DetectorOverloadedError: The queue is full, no replica is there, or none answered in time; nothing of what
                was judged comes back.
        """
        outcomes: Sequence[Detection | Refusal] = await self._call("detect", images, list(categories))
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
            reason = str(error).strip().partition("\n")[0]
            raise DetectorOverloadedError(f"no detector replica took the call ({reason}); it is tried again") from error


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
        self._consumer: str = serve.get_replica_context().replica_id.unique_id
        self._worker = StreamWorker(
            RedisStreamReader(
                self._client,
                keys,
                self._consumer,
                settings.redis,
                claim_idle_ms=settings.worker.claim_idle_ms,
            ),
            RedisResultSink(self._client, keys, self._consumer),
            HandleDetector(detector, settings.detector.timeout_s),
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
        stats = self._worker.stats
        told: dict[str, object] = {one.name: getattr(stats, one.name) for one in fields(stats)}
        return {**told, "dead": {str(reason): count for reason, count in stats.dead.items()}}

    async def check_health(self) -> None:
        """Have Serve replace a replica whose loop ended unasked."""
        if self._loop_task.done() and not self._stop.is_set():
            raise RuntimeError(f"the worker's loop has ended: {self._loop_task}")

    async def drain(self) -> str:
        """Finish the batches under way and read no more; what is not finished in time another worker claims.

        Returns:
            Which replica it was.
        """
        self._stop.set()
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self._loop_task, _DRAIN_S)
        return self._consumer

    async def __del__(self) -> None:
        """Finish the batches under way."""
        with contextlib.suppress(AttributeError):  # the constructor failed
            await self.drain()
            self._worker.close()
            await self._client.aclose()


@serve.ingress()
class ApiDeployment:
    """Hosts the HTTP API; what it answers is defined in `serving.api`."""

    def __init__(self, settings: Settings, detector: DeploymentHandle, worker: DeploymentHandle | None) -> None:
        self._limits = settings.limits
        self._detector = HandleDetector(detector, settings.detector.timeout_s)
        self._worker = worker

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Give Serve the application, once the handles are here."""
        return build_api(self._detector, self._status, self._limits)

    async def _status(self) -> dict[str, object]:
        told: dict[str, object] = {"detector": await self._detector.status()}
        if self._worker is not None:
            told["worker"] = await self._worker.status.remote()
        return told
