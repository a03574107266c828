"""Access tokens and security headers of the HTTP API. Knows no route and no stream."""

import hmac
import logging
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.errors import ConfigError
from schemas.settings import ApiSettings
from serving.api.problems import Problem, RequestRefusedError

_log = logging.getLogger(__name__)

DOCUMENTS = ("/docs", "/static-offline-docs")
"""Paths of the documentation pages, which need scripts and styles and show no data."""

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MAX_QUERY_BYTES = 4096
"""Enough for the longest id with every character escaped."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_DOCUMENT_HEADERS = {
    **_HEADERS,
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self' 'unsafe-inline'; "
        "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Tokens:
    """The tokens that the API accepts. Only their digests are kept in memory.

    Args:
        settings: The tokens or their file. The file is read again when it changes, so that tokens can be rotated
            without a restart; if it cannot be read any more, all requests are refused.

    Raises:
        ConfigError: Tokens and a file are both set, or a token is empty, or the file has no token or cannot be read.
    """

    def __init__(self, settings: ApiSettings) -> None:
        if settings.tokens and settings.tokens_file is not None:
            raise ConfigError("api.tokens and api.tokens_file are both set; leave one of them out")
        self._file = settings.tokens_file
        self._version: object = None
        self._digests = [_digest(token.get_secret_value().encode()) for token in settings.tokens]
        if any(not token.get_secret_value().strip() for token in settings.tokens):
            raise ConfigError("one of api.tokens is empty; make one with: openssl rand -hex 32")
        if self._file is not None:
            try:
                self._read(self._file)
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"api.tokens_file={self._file} cannot be read: {error}") from error
            if not self._digests:
                raise ConfigError(f"api.tokens_file={self._file} has no token; write one a line")

    @property
    def required(self) -> bool:
        """Whether requests need a token."""
        return bool(self._digests) or self._file is not None

    def accept(self, given: str) -> bool:
        """Return whether this is one of the tokens, comparing in constant time."""
        if self._file is not None:
            try:
                self._read(self._file)
            except (OSError, UnicodeDecodeError) as error:
                if self._version is not None:
                    _log.error("api.tokens_file=%s cannot be read, so all requests are refused: %s", self._file, error)
                self._digests, self._version = [], None
        digest = _digest(given.encode("latin-1", "replace"))  # the header's bytes
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # noqa: C419 - constant time

    def _read(self, file: Path) -> None:
        stat = file.stat()
        version = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if version == self._version:
            return
        lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        self._digests = [_digest(line.encode()) for line in lines if line and not line.startswith("#")]
        self._version = version

    async def check(
        self,
        given: Annotated[
            HTTPAuthorizationCredentials | None,
            Security(
                HTTPBearer(scheme_name="token", description="Required if the service has tokens.", auto_error=False)
            ),
        ],
    ) -> None:
        """Refuse a request without a valid token, if tokens are required. A FastAPI dependency.

        Raises:
            RequestRefusedError: 401.
        """
        if not self.required or (given is not None and self.accept(given.credentials)):
            return
        challenge = "Bearer" if given is None else 'Bearer error="invalid_token"'
        raise RequestRefusedError(
            401,
            "unauthorized",
            "send a token of this service: 'Authorization: Bearer <token>'",
            {"WWW-Authenticate": challenge},
        )


class GuardedApp:
    """ASGI middleware that adds security headers to every response, errors included, and refuses what is no client's.

    That is a long query, a request under a foreign name (a page whose name leads to this machine), and a request that a
    page of another site made a browser send.

    Args:
        app: The wrapped application.
        hosts: Names in the Host header; None: any.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _DOCUMENT_HEADERS if scope["path"].startswith(DOCUMENTS) else _HEADERS

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        if (refused := self._refusal(scope)) is not None:
            status, problem = refused
            await JSONResponse(problem.model_dump(), status_code=status)(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> tuple[int, Problem] | None:
        if len(scope["query_string"]) > _MAX_QUERY_BYTES:
            return 414, Problem(reason="too_large", detail=f"the query has more than {_MAX_QUERY_BYTES:,} bytes")
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 421, Problem(
                reason="unknown_host", detail=f"no service is called {host[:100]!r} here; see api.hosts"
            )
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and urlsplit(origin).netloc != host:
            return 403, Problem(
                reason="foreign_origin", detail="pages of other sites may not send requests to this API"
            )
        return None


def allowed_hosts(settings: ApiSettings) -> frozenset[str] | None:
    """Return the names in the Host header by which the API may be called; None: any."""
    if settings.hosts:
        return frozenset(map(str.lower, settings.hosts))
    return _LOOPBACK_NAMES | {settings.host.lower()} if is_loopback(settings.host) else None


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """Return a Host header without its port."""
    return host.lower().rpartition("]")[0] + "]" if host.startswith("[") else host.lower().partition(":")[0]


def warn_if_open(settings: ApiSettings) -> None:
    """Log a warning if the API can be reached from the network without a token."""
    if not is_loopback(settings.host) and not settings.tokens and settings.tokens_file is None:
        _log.warning(
            "the HTTP API listens on %s without a token: everyone who reaches it can push images and have them "
            "judged; set api.tokens_file, or let it listen on 127.0.0.1",
            settings.host,
        )


def _digest(token: bytes) -> bytes:
    return sha256(token).digest()
