"""Pushes images, for producers written in Python. Any other client needs no more than XADD."""

import asyncio
from collections.abc import Mapping
from datetime import datetime

from redis.exceptions import OutOfMemoryError

from schemas.errors import BacklogFullError
from schemas.keys import StreamKeys
from schemas.settings import BacklogSettings, LimitSettings, RedisSettings
from schemas.wire import parse_image
from workers.backoff import backoff_s
from workers.connection import StreamClient, address, load_script, stream_errors

_REMEMBER_S = 600
"""How long a pushed id is known: a push repeated within writes nothing."""


class Producer(StreamClient):
    """Pushes images, refusing when the backlog is full.

    A push that was cut off may or may not have happened. Push again with the same `id`: the image is on the stream
    once.

    Args:
        settings: Where the stream is.
        limits: What a worker would refuse is refused here, before it is sent.
        backlog: When the backlog is full.
    """

    def __init__(
        self,
        settings: RedisSettings,
        limits: LimitSettings = LimitSettings(),  # noqa: B008 - frozen
        backlog: BacklogSettings = BacklogSettings(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(settings)
        self._keys = StreamKeys(prefix=settings.prefix)
        self._limits = limits
        self._max_images = backlog.max_images
        self._script = self._client.register_script(load_script("push.lua"))

    async def push(
        self,
        image: bytes,
        category: str,
        *,
        id: str | None = None,  # noqa: A002 - the field's name on the wire
        captured_at: datetime | None = None,
        extra: Mapping[str, bytes] | None = None,
        wait_s: float = 0.0,
    ) -> str:
        """Push one image.

        Args:
            image: JPEG, PNG, WebP, BMP or TIFF bytes.
            category: Whose model judges it.
            id: The producer's own key. Pushed twice within ten minutes, it is on the stream once. Without it, the
                result has the entry's id.
            captured_at: When the camera took it, with its zone.
            extra: Fields that come back with the result.
            wait_s: How long to wait for room before giving up.

        Returns:
            The entry's id; that of the first push where `id` was pushed before.

        Raises:
            MessageError: A worker would refuse it: `too_large` or `malformed`.
            BacklogFullError: There is no room, and nothing was written.
            StreamUnavailableError: The server does not answer; whether the image was written is not known.
            ConfigError: The server refuses the user.
        """
        fields = {name.encode(): value for name, value in (extra or {}).items()}
        fields[b"category"] = category.encode()
        fields[b"image"] = image
        if id is not None:
            fields[b"id"] = id.encode()
        if captured_at is not None:
            fields[b"captured_at"] = captured_at.isoformat().encode()
        parse_image("0-0", fields, self._limits)
        deadline = asyncio.get_running_loop().time() + wait_s
        failures = 0
        while True:
            try:
                return await self._push_once(id, fields)
            except BacklogFullError:
                failures += 1
                left_s = deadline - asyncio.get_running_loop().time()
                if left_s <= 0:
                    raise
                await asyncio.sleep(min(left_s, backoff_s(failures)))

    async def _push_once(self, message_id: str | None, fields: Mapping[bytes, bytes]) -> str:
        keys = [self._keys.images]
        if message_id:
            keys.append(f"{self._keys.prefix}:seen:{message_id}")
        values: list[bytes | int] = [self._max_images, _REMEMBER_S]
        for name, value in fields.items():
            values += (name, value)
        with stream_errors(self._client):
            try:
                entry_id, length = await self._script(keys=keys, args=values)
            except OutOfMemoryError as error:
                raise BacklogFullError(
                    f"the server at {address(self._client)} is out of memory and nothing was written; "
                    "wait for the workers, or raise its maxmemory"
                ) from error
        if not entry_id:
            raise BacklogFullError(
                f"{length:,} images wait on {self._keys.images} and {self._max_images:,} are allowed; "
                "nothing was written; wait, add workers, or raise backlog.max_images"
            )
        return str(entry_id.decode())
