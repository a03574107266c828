"""The HTTP API as a plain ASGI application over a `Detector` and a `Pusher`. Knows no Ray and no Redis."""

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
from pydantic import AwareDatetime, BaseModel
from starlette.types import ASGIApp

from flawstream.imaging.decode import decode_image
from schemas.errors import FlawstreamError, MessageError, ModelUnavailableError
from schemas.messages import CATEGORY_PATTERN, Box, DetectionResult, ImageMessage, MapCodec, Verdict
from schemas.settings import ApiSettings, LimitSettings
from serving.api.bodies import Bodies
from serving.api.problems import RETRY, Problem, answer_failures
from serving.api.security import GuardedApp, Tokens
from workers.consume.result_builder import Times, build_result
from workers.ports import Deferral, Detector, Refusal

log = logging.getLogger(__name__)

Status = Callable[[], Awaitable[dict[str, object]]]
CategoryParameter = Annotated[str, Query(pattern=CATEGORY_PATTERN, description="Whose model judges the image.")]

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
    """Puts an image onto the stream; `workers.produce.producer.Producer` does."""

    async def push(
        self,
        image: bytes,
        category: str,
        *,
        id: str | None = None,  # noqa: A002 - the field's name on the wire
        captured_at: datetime | None = None,
        traceparent: str | None = None,
    ) -> str:
        """Push one image; gives the entry's id."""
        ...


class MapBody(BaseModel):
    """An anomaly map in JSON.

    Attributes:
        codec: How `data` is to be read.
        shape: (height, width) in pixels once decoded.
        grids: (height, width) of each native grid, for `grid-f16`.
        data: Base64.
    """

    codec: MapCodec
    shape: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    data: str


class DetectionBody(BaseModel):
    """The answer to one image; the fields mean what they mean on the results stream."""

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
    """An image is on the stream.

    Attributes:
        id: What its result or dead letter will have; your own, or the entry's.
        entry_id: The entry's on the images stream; of the first push, where `id` was pushed before.
    """

    id: str
    entry_id: str


def build_api(
    detector: Detector, pusher: Pusher, status: Status, settings: ApiSettings, limits: LimitSettings
) -> ASGIApp:
    """Build the application.

    Args:
        detector: Judges images.
        pusher: Puts images onto the stream.
        status: Tells how the service is; it raises what `readyz` then reports.
        settings: Who may ask.
        limits: What is refused before anything is decoded.

    Raises:
        ConfigError: The tokens cannot be had.
    """
    tokens, bodies = Tokens(settings), Bodies(limits.max_image_bytes)
    app = FastAPIOffline(  # its pages need no other host, which a plant may not reach
        redoc_url=None,
        title="flawstream",
        summary="Anomaly score, verdict and anomaly map for one image.",
        description="For production lines push images to the stream instead: it is durable, and `/v1/detect` is not.",
    )
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(tokens.check)])
    _add_detect(v1, detector, bodies, limits)
    _add_images(v1, pusher, bodies)

    @app.get("/healthz", summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        summary="Whether detector, stream server and stream worker are at work",
        responses={503: {"model": Problem}},
    )
    async def readyz() -> JSONResponse:
        try:
            return JSONResponse({"status": "ready", **await status()})
        except FlawstreamError as error:
            problem = Problem(reason="not_ready", detail=str(error))
        except Exception as error:  # whatever keeps it from being ready is the answer
            log.exception("the service is not ready")
            problem = Problem(reason="not_ready", detail=f"{type(error).__name__}; the log of the API has the rest")
        return JSONResponse(problem.model_dump(), status_code=503, headers=RETRY)

    app.include_router(v1)
    answer_failures(app)
    return GuardedApp(app)


def _add_detect(v1: APIRouter, detector: Detector, bodies: Bodies, limits: LimitSettings) -> None:
    @v1.post(
        "/detect",
        summary="Judge one image",
        responses=_problems(401, 404, 408, 413, 414, 415, 422, 500, 503),
        openapi_extra=_IMAGE_BODY,
    )
    async def post_detect(
        request: Request,
        category: CategoryParameter,
        id: Annotated[str, Query(max_length=256, description="Your own key; made up if absent.")] = "",  # noqa: A002
        map: Annotated[MapCodec, Query(description="How to send the anomaly map.")] = MapCodec.NONE,  # noqa: A002
    ) -> DetectionBody:
        started = time.perf_counter()
        async with bodies.read(request) as data:
            message = ImageMessage(id=id or uuid.uuid4().hex, category=category, image=data)
            form = await detector.pixel_form()
            decoding = time.perf_counter()
            image = await run_in_threadpool(decode_image, data, form, limits)
        detecting = time.perf_counter()
        (outcome,) = await detector.detect(image.pixels[np.newaxis], [category])
        if isinstance(outcome, Refusal):
            raise MessageError(outcome.reason, outcome.detail)
        if isinstance(outcome, Deferral):
            raise ModelUnavailableError(outcome.detail)
        ended = time.perf_counter()
        times = Times(
            queued_ms=0.0,
            decode_ms=(detecting - decoding) * 1000,
            detect_ms=(ended - detecting) * 1000,
            total_ms=(ended - started) * 1000,
        )
        return await run_in_threadpool(lambda: _body(build_result(message, image, outcome, map, times)))


def _add_images(v1: APIRouter, pusher: Pusher, bodies: Bodies) -> None:
    @v1.post(
        "/images",
        status_code=202,
        summary="Push one image onto the stream",
        description="Its result comes on the results stream. Where the answer was lost, or is 503, push again with "
        "the same `id`: the image is on the stream once.",
        responses=_problems(401, 408, 413, 414, 422, 429, 500, 503),
        openapi_extra=_IMAGE_BODY,
    )
    async def post_image(
        request: Request,
        category: CategoryParameter,
        *,
        id: Annotated[str, Query(max_length=256, description="Your own key; the entry's id if absent.")] = "",  # noqa: A002
        captured_at: Annotated[
            AwareDatetime | None, Query(description="When the camera took it: RFC 3339, with a zone.")
        ] = None,
        captured_at_header: Annotated[
            AwareDatetime | None, Header(alias="Captured-At", description="The same, where `+` need not be escaped.")
        ] = None,
        traceparent: Annotated[str, Header(description="W3C trace context; comes back in the result.")] = "",
    ) -> PushedBody:
        async with bodies.read(request) as data:
            entry_id = await pusher.push(
                data,
                category,
                id=id or None,
                captured_at=captured_at or captured_at_header,
                # the worker ignores one that is malformed; of another length it could be as long as a header
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
