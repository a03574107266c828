"""The HTTP API as a plain ASGI application over a `Detector`. Knows no Ray and no stream."""

import base64
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from flawstream.images import decode_image
from schemas.errors import FlawstreamError, MessageError, Reason, TransientError
from schemas.messages import CATEGORY_PATTERN, Box, DetectionResult, ImageMessage, MapCodec, Verdict
from schemas.settings import LimitSettings
from workers.answer import Times, build_result
from workers.ports import Detector, Refusal

log = logging.getLogger(__name__)

Status = Callable[[], Awaitable[dict[str, object]]]

_STATUS_OF_REASON = {
    Reason.TOO_LARGE: 413,
    Reason.UNDECODABLE: 415,
    Reason.UNKNOWN_CATEGORY: 404,
    Reason.MALFORMED: 422,
}
_RETRY = {"Retry-After": "1"}


class Problem(BaseModel):
    """Why a request was refused.

    Attributes:
        reason: A code from a closed set.
        detail: What was wrong, where, and what to do.
    """

    reason: str
    detail: str


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


def build_api(detector: Detector, status: Status, limits: LimitSettings) -> FastAPI:
    """Build the application.

    Args:
        detector: Judges images.
        status: Tells how the service is; it raises what `readyz` then reports.
        limits: What is refused before anything is decoded.
    """
    app = FastAPI(
        title="flawstream",
        summary="Anomaly score, verdict and anomaly map for one image.",
        description="For production lines push images to the Redis stream instead: it is durable, and this is not.",
    )

    @app.get("/healthz", summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether detector and stream worker are at work", responses={503: {"model": Problem}})
    async def readyz() -> JSONResponse:
        try:
            return JSONResponse({"status": "ready", **await status()})
        except FlawstreamError as error:
            problem = Problem(reason="not_ready", detail=str(error))
        except Exception as error:  # whatever keeps it from being ready is the answer
            log.exception("the service is not ready")
            problem = Problem(reason="not_ready", detail=f"{type(error).__name__}; the log of the API has the rest")
        return JSONResponse(problem.model_dump(), status_code=503, headers=_RETRY)

    @app.post(
        "/v1/detect",
        summary="Judge one image",
        responses={code: {"model": Problem} for code in (404, 413, 415, 422, 500, 503)},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    kind: {"schema": {"type": "string", "format": "binary"}}
                    for kind in ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff")
                },
            }
        },
    )
    async def post_detect(
        request: Request,
        category: Annotated[str, Query(pattern=CATEGORY_PATTERN, description="Whose model judges the image.")],
        id: Annotated[str, Query(max_length=256, description="Your own key; made up if absent.")] = "",  # noqa: A002
        map: Annotated[MapCodec, Query(description="How to send the anomaly map.")] = MapCodec.NONE,  # noqa: A002
    ) -> DetectionBody:
        started = time.perf_counter()
        data = await _read_body(request, limits.max_image_bytes)
        message = ImageMessage(id=id or uuid.uuid4().hex, category=category, image=data)
        size = await detector.input_size()
        decoding = time.perf_counter()
        image = await run_in_threadpool(decode_image, data, size, limits)
        detecting = time.perf_counter()
        (outcome,) = await detector.detect(image.pixels[np.newaxis], [category])
        if isinstance(outcome, Refusal):
            raise MessageError(outcome.reason, outcome.detail)
        ended = time.perf_counter()
        times = Times(
            queued_ms=0.0,
            decode_ms=(detecting - decoding) * 1000,
            detect_ms=(ended - detecting) * 1000,
            total_ms=(ended - started) * 1000,
        )
        return await run_in_threadpool(lambda: _body(build_result(message, image, outcome, map, times)))

    _answer_failures(app)
    return app


def _answer_failures(app: FastAPI) -> None:
    """Have every failure answered by a `Problem`, without a traceback."""

    @app.exception_handler(FlawstreamError)
    async def refuse(_: Request, error: FlawstreamError) -> JSONResponse:
        if isinstance(error, MessageError):
            code, reason = _STATUS_OF_REASON.get(error.reason, 422), str(error.reason)
        else:
            code, reason = (503 if isinstance(error, TransientError) else 500), error.code
        headers = _RETRY if isinstance(error, TransientError) else None
        return JSONResponse(Problem(reason=reason, detail=str(error)).model_dump(), status_code=code, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_parameters(_: Request, error: RequestValidationError) -> JSONResponse:
        told = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        return JSONResponse(Problem(reason=Reason.MALFORMED, detail=told).model_dump(), status_code=422)

    @app.exception_handler(Exception)
    async def hide(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed unexpectedly", exc_info=error)
        problem = Problem(reason="internal", detail="a bug; the log of the API has the rest")
        return JSONResponse(problem.model_dump(), status_code=500)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body and stop at the limit, whatever Content-Length says."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise MessageError(
                Reason.TOO_LARGE,
                f"the body has more than {max_bytes:,} bytes; send a smaller image or raise limits.max_image_bytes",
            )
    if not data:
        raise MessageError(
            Reason.MALFORMED,
            "the body is empty; send an image: curl --data-binary @part.png '<address>/v1/detect?category=<category>'",
        )
    return bytes(data)


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
