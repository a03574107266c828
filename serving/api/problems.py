"""Error responses of the HTTP API: their body, and the status code of each error."""

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from schemas.errors import BacklogFullError, FlawstreamError, IdConflictError, MessageError, Reason, TransientError

_log = logging.getLogger(__name__)

RETRY = {"Retry-After": "1"}

_STATUS_OF_REASON = {
    Reason.TOO_LARGE: 413,
    Reason.UNDECODABLE: 415,
    Reason.UNKNOWN_CATEGORY: 404,
    Reason.MALFORMED: 422,
}


class Problem(BaseModel):
    """Body of every error response.

    Attributes:
        reason: A code from a closed set.
        detail: The error, and what to do about it.
    """

    reason: str
    detail: str


class RequestRefusedError(Exception):
    """A request is refused because of the request itself, not because of its image.

    Args:
        status: HTTP status of the response.
        reason: A code from a closed set.
        detail: The error, and what to do about it.
        headers: Further headers of the response.
    """

    def __init__(self, status: int, reason: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.headers = headers


def answer_failures(app: FastAPI) -> None:
    """Register exception handlers that answer every error with a `Problem`, without a traceback."""

    @app.exception_handler(RequestRefusedError)
    async def refuse_request(_: Request, error: RequestRefusedError) -> JSONResponse:
        return _answer(error.status, error.reason, str(error), error.headers)

    @app.exception_handler(FlawstreamError)
    async def refuse(_: Request, error: FlawstreamError) -> JSONResponse:
        if isinstance(error, MessageError):
            return _answer(_STATUS_OF_REASON.get(error.reason, 422), str(error.reason), str(error))
        if isinstance(error, IdConflictError):
            return _answer(409, error.code, str(error))
        if isinstance(error, TransientError):
            return _answer(_status_of(error), error.code, str(error), RETRY)
        _log.error("a request failed (%s): %s", error.code, error)
        return _answer(500, error.code, "the service is misconfigured; see the log of the API")

    @app.exception_handler(RequestValidationError)
    async def refuse_parameters(_: Request, error: RequestValidationError) -> JSONResponse:
        detail = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        return _answer(422, Reason.MALFORMED, detail)

    @app.exception_handler(ClientDisconnect)
    async def end_disconnected(_: Request, __: ClientDisconnect) -> JSONResponse:
        return _answer(400, Reason.MALFORMED, "the client disconnected during the upload")  # no client will see it

    @app.exception_handler(Exception)
    async def hide(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed unexpectedly", exc_info=error)
        return _answer(500, "internal", "an unexpected error; see the log of the API")


def _status_of(error: TransientError) -> int:
    """Return 429 (RFC 6585) if the client must slow down, 503 (RFC 9110) if the service is temporarily unavailable."""
    return 429 if isinstance(error, BacklogFullError) else 503


def _answer(status: int, reason: str, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(Problem(reason=reason, detail=detail).model_dump(), status_code=status, headers=headers)
