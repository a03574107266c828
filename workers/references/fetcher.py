"""Fetches images by reference: what the allow-list covers, so many at once, so often, for so long, and no other way."""

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
from workers.references.source import PassingError, Source, forbidden, unavailable

_log = logging.getLogger(__name__)


class ImageFetcher(Protocol):
    """Gives the bytes that a reference leads to."""

    def fetch(self, text: str) -> AbstractAsyncContextManager[bytes]:
        """Hold the bytes of an image while the context lasts; how many can be held at once is bounded.

        Raises:
            MessageError: `forbidden_reference`, `unavailable_reference` or `too_large`.
            StreamUnavailableError: The stream server does not answer; nothing is said of the reference.
        """
        ...


class NoReferences:
    """An `ImageFetcher` where references are not enabled: it refuses them all."""

    def fetch(self, text: str) -> AbstractAsyncContextManager[bytes]:
        """Refuse."""
        del text
        raise MessageError(
            Reason.FORBIDDEN_REFERENCE,
            "field image_ref names an image elsewhere and references are not enabled; put the bytes in field image",
        )


class ReferenceFetcher:
    """An `ImageFetcher` for keys of the stream server, S3 and HTTP.

    Memory is bounded by `references.concurrency` times `limits.max_image_bytes`, twice while an image is put together.

    Args:
        settings: What is allowed, how often, how many at once, how long.
        limits: What is too large.
        client: Of the stream server.
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
        self._places = asyncio.Semaphore(settings.concurrency)
        self._sources: dict[str, Source] = {}
        patience_s = settings.timeout_s / settings.tries  # so that a silent server leaves time for the next try
        largest = limits.max_image_bytes
        schemes = {allowed.scheme for allowed in self._allowed}
        if "key" in schemes:
            self._sources["key"] = KeySource(client, largest)
        if "s3" in schemes:
            self._sources["s3"] = S3Source(largest, patience_s, settings.concurrency)
        if schemes & {"http", "https"}:
            self._sources |= dict.fromkeys(("http", "https"), HttpSource(largest, patience_s, settings.concurrency))

    @asynccontextmanager
    async def fetch(self, text: str) -> AsyncIterator[bytes]:
        """Hold the bytes of an image while the context lasts; see `ImageFetcher`."""
        reference = self._check(text)
        async with self._places:
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
                    except PassingError as error:
                        problem = str(error)
                        _log.info("try %d of %s: %s", failures, reference, problem)
                    if failures < self._settings.tries:
                        await self._clock.sleep(backoff_s(failures))
        except TimeoutError:
            raise unavailable(
                reference, f"{problem} within {self._settings.timeout_s:g} s (references.timeout_s)"
            ) from None
        raise unavailable(reference, f"{problem}, {self._settings.tries} times (references.tries)")
