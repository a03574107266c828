"""Fetches images by reference, where the allow-list covers it, with bounded concurrency, tries and time."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from schemas.errors import MessageError, Reason
from schemas.references import Reference, parse_allowed, parse_reference
from schemas.settings import LimitSettings, ReferenceSettings
from workers.ports import Clock
from workers.redis.backoff import backoff_s
from workers.redis.connection import StreamConnection
from workers.references.http import HttpSource
from workers.references.key import KeySource
from workers.references.s3 import S3Source
from workers.references.source import RetryableError, Source, forbidden, unavailable

_log = logging.getLogger(__name__)


class ImageFetcher(Protocol):
    """Fetches the bytes of images by reference."""

    def fetch(self, text: str) -> AbstractAsyncContextManager[bytes]:
        """Keep the bytes of an image in memory while the context lasts; how many are at once is bounded.

        Raises:
            MessageError: `forbidden_reference`, `unavailable_reference` or `too_large`.
            StreamUnavailableError: The stream server does not answer; the reference may be good.
        """
        ...


class NoReferences:
    """The `ImageFetcher` where references are not enabled: it refuses them all."""

    def fetch(self, text: str) -> AbstractAsyncContextManager[bytes]:
        """Refuse."""
        del text
        raise MessageError(
            Reason.FORBIDDEN_REFERENCE,
            "field image_ref names an image elsewhere and references are not enabled; put the bytes in field image",
        )


class ReferenceFetcher:
    """An `ImageFetcher` for keys of the stream server, S3 and HTTP.

    Memory is bounded by `references.concurrency` times `limits.max_image_bytes`, twice that while an image is copied.

    Args:
        settings: The allow-list, and the limits of tries, time and concurrency.
        limits: The largest image.
        client: A client of the stream server.
        clock: For the waits between tries.

    Raises:
        ConfigError: A package for an allowed scheme is not installed.
    """

    def __init__(
        self, settings: ReferenceSettings, limits: LimitSettings, client: StreamConnection, clock: Clock
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._allowed = tuple(map(parse_allowed, settings.allow))
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._sources: dict[str, Source] = {}
        try_timeout_s = settings.timeout_s / settings.tries  # a server that is silent leaves time for the next try
        max_bytes = limits.max_image_bytes
        schemes = {allowed.scheme for allowed in self._allowed}
        if "key" in schemes:
            self._sources["key"] = KeySource(client, max_bytes)
        if "s3" in schemes:
            self._sources["s3"] = S3Source(max_bytes, try_timeout_s, settings.concurrency)
        if schemes & {"http", "https"}:
            http = HttpSource(max_bytes, try_timeout_s, settings.concurrency)
            self._sources |= {"http": http, "https": http}

    @asynccontextmanager
    async def fetch(self, text: str) -> AsyncIterator[bytes]:
        """Keep the bytes of an image in memory while the context lasts; see `ImageFetcher`."""
        reference = self._check(text)
        async with self._slots:
            yield await self._read(reference)

    async def close(self) -> None:
        """Close the connections."""
        for source in set(self._sources.values()):
            await source.close()

    def _check(self, text: str) -> Reference:
        try:
            reference = parse_reference(text)
        except ValueError as error:
            raise MessageError(
                Reason.FORBIDDEN_REFERENCE, f"field image_ref is refused: {error}; put the bytes in field image"
            ) from None
        if not any(reference.is_below(allowed) for allowed in self._allowed):
            raise forbidden(reference, "references.allow does not cover it")
        return reference

    async def _read(self, reference: Reference) -> bytes:
        problem = "no answer"
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                for failures in range(1, self._settings.tries + 1):
                    try:
                        return await self._sources[reference.scheme].read(reference)
                    except RetryableError as error:
                        problem = str(error)
                        _log.info("try %d of %s: %s", failures, reference, problem)
                    if failures < self._settings.tries:
                        await self._clock.sleep(backoff_s(failures))
        except TimeoutError:
            raise unavailable(
                reference, f"{problem} within {self._settings.timeout_s:g} s (references.timeout_s)"
            ) from None
        raise unavailable(reference, f"{problem}, {self._settings.tries} times (references.tries)")
