"""The HTTP API, an ASGI application that uses a `Detector` and a `Pusher`. Knows no Ray and no Redis."""

import base64
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema
from starlette.types import ASGIApp

from flawstream.imaging.decode import decode_image
from schemas.errors import FlawstreamError, MessageError, ModelUnavailableError
from schemas.messages import CATEGORY_PATTERN, Box, CaptureTime, DetectionResult, ImageMessage, MapCodec, Verdict
from schemas.settings import ApiSettings, LimitSettings
from serving.api.bodies import Bodies
from serving.api.problems import RETRY, Problem, answer_failures
from serving.api.security import GuardedApp, Tokens, allowed_hosts
from workers.consume.result_builder import Times, build_result
from workers.ports import Deferral, Detector, Refusal

log = logging.getLogger(__name__)

Status = Callable[[], Awaitable[dict[str, object]]]
CategoryParameter = Annotated[
    str, Query(pattern=CATEGORY_PATTERN, description="Category whose model judges the image.")
]

_TRACEPARENT_LENGTH = 55
_IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff")
        },
    }
}


class Pusher(Protocol):
    """Pushes images to the stream; implemented by `workers.produce.producer.Producer`."""

    async def push(
        self,
        image: bytes,
        category: str,
        *,
        id: str | None = None,  # noqa: A002 - the field's name on the wire
        captured_at: datetime | None = None,
        traceparent: str | None = None,
    ) -> str:
        """Push one image; return the entry id."""
        ...


class MapBody(BaseModel):
    """An anomaly map in JSON.

    Attributes:
        codec: Encoding of `data`.
        shape: (height, width) in pixels of the decoded map.
        grids: (height, width) of each native grid, for `grid-f16`.
        data: The encoded map in base64.
    """

    codec: MapCodec
    shape: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    data: str


class DetectionBody(BaseModel):
    """The result of one image; the fields are those of the results stream."""

    id: str
    category: str
    score: float
    p_value: float
    threshold: float
    verdict: Verdict
    model: str
    boxes: tuple[Box, ...]
    image_shape: tuple[int, int]
    captured_at: datetime | None
    decode_ms: float
    detect_ms: float
    total_ms: float
    map: MapBody | None


class PushedBody(BaseModel):
    """Confirms that an image is on the stream.

    Attributes:
        id: The id of its result or dead letter: your own, or else the entry id.
        entry_id: Its entry id on the images stream; that of the first push, if `id` was pushed before.
    """

    id: str
    entry_id: str


def build_api(
    detector: Detector, pusher: Pusher, status: Status, settings: ApiSettings, limits: LimitSettings
) -> ASGIApp:
    """Build the application.

    Args:
        detector: Judges images.
        pusher: Pushes images to the stream.
        status: Returns the status of the service; `readyz` reports its exception as the reason for 503.
        settings: Tokens of the API.
        limits: Limits that are checked before an image is decoded.

    Raises:
        ConfigError: The tokens cannot be read.
    """
    tokens, bodies = Tokens(settings), Bodies(limits.max_image_bytes)
    app = FastAPIOffline(  # its pages load nothing from the internet, which a plant may not reach
        redoc_url=None,
        title="flawstream",
        summary="Anomaly score, verdict and anomaly map for one image.",
        description="For production lines push images to the stream instead: it is durable, and `/v1/detect` is not.",
    )
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(tokens.check)] if tokens.required else [])
    _add_detect(v1, detector, bodies, limits)
    _add_images(v1, pusher, bodies)

    @app.get("/healthz", summary="Whether the process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        summary="Whether detector, stream server and stream worker are ready",
        responses={503: {"model": Problem}},
    )
    async def readyz() -> JSONResponse:
        try:
            return JSONResponse({"status": "ready", **await status()})
        except FlawstreamError as error:
            problem = Problem(reason="not_ready", detail=str(error))
        except Exception as error:  # the check itself must always answer
            log.exception("the service is not ready")
            problem = Problem(reason="not_ready", detail=f"{type(error).__name__}; see the log of the API")
        return JSONResponse(problem.model_dump(), status_code=503, headers=RETRY)

    app.include_router(v1)
    answer_failures(app)
    return GuardedApp(app, allowed_hosts(settings))


def _add_detect(v1: APIRouter, detector: Detector, bodies: Bodies, limits: LimitSettings) -> None:
    @v1.post(
        "/detect",
        summary="Judge one image",
        responses=_problems(401, 403, 404, 408, 413, 414, 415, 421, 422, 500, 503),
        openapi_extra=_IMAGE_BODY,
    )
    async def post_detect(
        request: Request,
        category: CategoryParameter,
        id: Annotated[str, Query(max_length=256, description="Your own id; generated if absent.")] = "",  # noqa: A002
        map: Annotated[MapCodec, Query(description="How to send the anomaly map.")] = MapCodec.NONE,  # noqa: A002
    ) -> DetectionBody:
        received_s = time.perf_counter()
        async with bodies.read(request) as data:
            message = ImageMessage(id=id or uuid.uuid4().hex, category=category, image=data)
            (form,) = await detector.pixel_forms([category])
            decode_start_s = time.perf_counter()
            image = await run_in_threadpool(decode_image, data, form, limits)
        detect_start_s = time.perf_counter()
        (outcome,) = await detector.detect(image.pixels[np.newaxis], [category], [image.depth])
        if isinstance(outcome, Refusal):
            raise MessageError(outcome.reason, outcome.detail)
        if isinstance(outcome, Deferral):
            raise ModelUnavailableError(outcome.detail)
        done_s = time.perf_counter()
        times = Times(
            queued_ms=0.0,
            decode_ms=(detect_start_s - decode_start_s) * 1000,
            detect_ms=(done_s - detect_start_s) * 1000,
            total_ms=(done_s - received_s) * 1000,
        )
        return await run_in_threadpool(lambda: _body(build_result(message, image, outcome, map, times)))


def _add_images(v1: APIRouter, pusher: Pusher, bodies: Bodies) -> None:
    @v1.post(
        "/images",
        status_code=202,
        summary="Push one image to the stream",
        description="The result is published on the results stream. If the response is lost, or is 503, push again "
        "with the same `id`: the push is idempotent. 409: another image was pushed with that `id`.",
        responses=_problems(401, 403, 408, 409, 413, 414, 421, 422, 429, 500, 503),
        openapi_extra=_IMAGE_BODY,
    )
    async def post_image(
        request: Request,
        category: CategoryParameter,
        *,
        id: Annotated[str, Query(max_length=256, description="Your own id; the entry id if absent.")] = "",  # noqa: A002
        captured_at: Annotated[
            CaptureTime | SkipJsonSchema[None], Query(description="Time of capture: RFC 3339, with a time zone.")
        ] = None,
        captured_at_header: Annotated[
            CaptureTime | SkipJsonSchema[None],
            Header(alias="Captured-At", description="The same as a header: no escaping of `+`."),
        ] = None,
        traceparent: Annotated[str, Header(description="W3C trace context; copied to the result.")] = "",
    ) -> PushedBody:
        async with bodies.read(request) as data:
            entry_id = await pusher.push(
                data,
                category,
                id=id or None,
                captured_at=captured_at or captured_at_header,
                # the length bounds what is stored; the worker ignores a malformed one
                traceparent=traceparent if len(traceparent) == _TRACEPARENT_LENGTH else None,
            )
        return PushedBody(id=id or entry_id, entry_id=entry_id)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}


def _body(result: DetectionResult) -> DetectionBody:
    encoded = None
    if result.map.codec is not MapCodec.NONE:
        encoded = MapBody(
            codec=result.map.codec,
            shape=result.map.shape,
            grids=result.map.grids,
            data=base64.b64encode(result.map.data).decode(),
        )
    return DetectionBody(**{**result.model_dump(include=set(DetectionBody.model_fields) - {"map"}), "map": encoded})
