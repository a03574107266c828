"""Pushes images, for producers written in Python. Any other client needs no more than XADD."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import cycle
from typing import Any

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from flawstream.telemetry.traces import NO_TRACER, Tracer
from schemas.errors import BacklogFullError, FlawstreamError, IdConflictError, StreamUnavailableError
from schemas.keys import StreamKeys, all_keys, keys_of
from schemas.settings import BacklogSettings, LimitSettings, RedisSettings
from schemas.wire import parse_image
from workers.produce.admission import REMEMBER_S, Admission, retry_until_admitted
from workers.produce.durability import DurableScript
from workers.redis.client import StreamClient
from workers.redis.errors import stream_errors
from workers.redis.scripts import Script

_DIGEST_BYTES = 16


class Producer(StreamClient):
    """Pushes images; refuses them when the backlog is full.

    A push whose reply was lost may or may not have been written. Push again with the same `id`: the image is on the
    stream once. Another image with that `id` is refused. With shards, an image with an `id` goes to the shard of that
    `id`, others go round-robin. After a refusal for want of capacity, that is asked for before the next image is sent,
    so that refusals transfer no images.

    Args:
        settings: Where the streams are, and what to wait for after a push.
        limits: What a worker would refuse is refused here, before it is sent.
        backlog: The bounds of the backlog.
        metrics: Receives counts and times; `flawstream.telemetry.prometheus.serve_metrics` makes one for Prometheus.
        tracer: Receives spans; `flawstream.telemetry.choose_tracer.open_tracer` makes one.
    """

    def __init__(
        self,
        settings: RedisSettings,
        limits: LimitSettings = LimitSettings(),  # noqa: B008 - frozen
        backlog: BacklogSettings = BacklogSettings(),  # noqa: B008 - frozen
        metrics: Metrics = NO_METRICS,
        *,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        super().__init__(settings)
        self._tracer = tracer
        self._metrics = metrics
        self._settings = settings
        self._limits = limits
        self._shards = cycle(all_keys(settings))
        self._admission = Admission(self._client, backlog)
        self._full: set[StreamKeys] = set()
        self._ask_script = Script(self._client, "_capacity.lua", "ask_capacity.lua")
        self._push_script = DurableScript(self._client, settings, "_capacity.lua", "push_image.lua")

    async def open(self) -> None:
        """Check that the server answers, can run our scripts, and can wait as configured.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: It is too old, refuses the user, or has no AOF to wait for.
        """
        await super().open()
        await self._push_script.check()

    async def push(
        self,
        image: bytes,
        category: str,
        *,
        id: str | None = None,  # noqa: A002 - the field's name on the wire
        captured_at: datetime | None = None,
        traceparent: str | None = None,
        extra: Mapping[str, bytes] | None = None,
        wait_s: float = 0.0,
    ) -> str:
        """Push one image.

        Args:
            image: JPEG, PNG, WebP, BMP or TIFF bytes.
            category: Whose model judges it.
            id: The producer's own key. Pushed twice within ten minutes, the image is on the stream once; another image
                or category with the same key is refused. Absent: the result has the entry's id.
            captured_at: When the camera took it, with its zone.
            traceparent: W3C trace context; comes back with the result. With a tracer it is the parent of the push's
                span, whose own is sent in its place.
            extra: Fields that come back with the result.
            wait_s: How long to retry while the backlog is full; 0 tries once.

        Returns:
            The entry's id; that of the first push where `id` was pushed before.

        Raises:
            MessageError: A worker would refuse it: `too_large` or `malformed`.
            BacklogFullError: The backlog is full, and nothing was written.
            IdConflictError: Another image was pushed with this `id`, and nothing was written.
            StreamUnavailableError: The server does not answer, and whether the image was written is not known; or it
                was written, and is not yet as durable as `redis.wait_replicas` and `redis.wait_local_fsync` ask. Push
                it again with the same `id`: that waits anew.
            ConfigError: The server refuses the user.
        """
        fields = {name.encode(): value for name, value in (extra or {}).items()}
        fields[b"category"] = category.encode()
        fields[b"image"] = image
        if id is not None:
            fields[b"id"] = id.encode()
        if captured_at is not None:
            fields[b"captured_at"] = captured_at.isoformat().encode()
        with self._counted(), self._tracer.push(traceparent, {"category": category}) as carried:
            if carried:
                fields[b"traceparent"] = carried.encode()
            parse_image("0-0", fields, self._limits)
            keys = keys_of(self._settings, id) if id else next(self._shards)
            return await retry_until_admitted(partial(self._push_once, keys, id, fields), wait_s)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a push by its outcome, and time it."""
        began_s = time.perf_counter()
        outcome = "written"
        try:
            yield
        except FlawstreamError as error:
            outcome = error.code
            raise
        except BaseException:
            outcome = "error"
            raise
        finally:
            self._metrics.add(m.PUSHES, outcome=outcome)
            self._metrics.observe(m.PUSH_SECONDS, time.perf_counter() - began_s)

    async def _push_once(self, keys: StreamKeys, message_id: str | None, fields: Mapping[bytes, bytes]) -> str:
        names = Admission.keys(keys)
        digest = ""
        if message_id:
            names += [keys.seen(message_id), keys.outcomes_since]
            digest = _digest(fields)
        values: list[str | bytes | int] = [*self._admission.bounds, REMEMBER_S, digest]
        for name, value in fields.items():
            values += (name, value)
        with stream_errors(self._client):
            try:
                async with self._admission.memory_errors(keys):
                    if keys in self._full:
                        self._admission.refuse(keys, await self._ask_script(keys=names, args=self._admission.bounds))
                    read = partial(self._entry_id, keys, message_id)
                    entry_id, lacking = await self._push_script(names, values, read)
            except BacklogFullError:
                self._full.add(keys)
                raise
            self._full.discard(keys)
        if lacking:
            raise StreamUnavailableError(
                f"the image is written, as entry {entry_id} of {keys.images}, but is not yet as safe as "
                f"redis.wait_replicas and redis.wait_local_fsync ask: {lacking} after {self._settings.timeout_s:g} s; "
                "push it again with the same id, which waits anew and writes nothing twice"
            )
        return entry_id

    def _entry_id(self, keys: StreamKeys, message_id: str | None, reply: Sequence[Any]) -> str:
        """Return the entry id in the reply of the push script.

        Raises:
            BacklogFullError: The backlog is full, and nothing was written.
            IdConflictError: Another image has the id, and nothing was written.
        """
        if reply[1:2] == [b"other image"]:
            raise IdConflictError(
                f"the id {message_id!r} was pushed with another image or category less than {REMEMBER_S // 60} minutes "
                f"ago, as entry {reply[2].decode()} of {keys.images}; nothing was written; "
                "give every image an id of its own"
            )
        return self._admission.entry_id(keys, reply)


def _digest(fields: Mapping[bytes, bytes]) -> str:
    """Return a digest of what makes two pushes the same image: its category and bytes. Takes 2 ms a MiB."""
    digest = hashlib.blake2b(fields[b"category"] + b"\0", digest_size=_DIGEST_BYTES)
    digest.update(fields[b"image"])
    return digest.hexdigest()
