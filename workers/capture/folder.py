"""Pushes the files of a folder, each once.

A file's message id is derived from its path, time of change and bytes, so that one pushed just before a kill and again
after the restart is on the stream once; the ledger knows all those before.
"""

import asyncio
import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import (
    IdConflictError,
    MessageError,
    Reason,
    SourceUnavailableError,
    StageTimeoutError,
    TransientError,
    one_line,
)
from workers.capture.disposal import Disposal
from workers.capture.hot_folder import FoundFile, HotFolder, Listing
from workers.capture.ledger import Ledger
from workers.capture.pause import pause
from workers.produce.producer import Producer
from workers.redis.backoff import backoff_s

_T = TypeVar("_T")
_BATCH_FILES = 16
_BATCH_BYTES = 64 << 20
_ANSWER_S = 300.0
"""Longest time for the folder to answer: one listing, or the files of a batch."""
_WAIT_S = 1.0
"""Of a push for capacity, before it looks whether to stop."""
_TIDY_S = 3600.0
_REMEMBERED_S = 24 * 3600.0
_DIGEST_BYTES = 8
_MOST_NAME = 200
"""Characters of a path in an id; 256 are allowed for the id."""


@dataclass(slots=True)
class FolderStats:
    """Counts of one folder's capture.

    Attributes:
        pushed: Files pushed; the stream has each once.
        refused: Files that the stream would never take.
        pushed_bytes: Their bytes.
        settling: Files that changed a short time ago, at the last listing.
        passed_over: Files that are not pushed, by reason, at the last listing.
    """

    pushed: int = 0
    refused: int = 0
    pushed_bytes: int = 0
    settling: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON has them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _ReadFile:
    """A file that was read.

    Attributes:
        file: The file as it was listed.
        data: Its bytes.
        message_id: The id to push it with; empty: too large to be read.
    """

    file: FoundFile
    data: bytes
    message_id: str


class FolderCapture:
    """Pushes the complete files of a folder, the oldest first, and waits where the backlog is full.

    Args:
        folder: The folder.
        ledger: Remembers what was pushed.
        producer: Pushes.
        max_image_bytes: Larger files are refused without being read.
        dispose: Removes pushed files from the folder; None: they stay, and are remembered.
        metrics: Receives counts.
        report: Receives messages for a person.
    """

    def __init__(
        self,
        folder: HotFolder,
        ledger: Ledger,
        producer: Producer,
        max_image_bytes: int,
        *,
        dispose: Disposal | None = None,
        metrics: Metrics = NO_METRICS,
        report: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._folder = folder
        self._ledger = ledger
        self._producer = producer
        self._max_image_bytes = max_image_bytes
        self._dispose = dispose
        self._metrics = metrics
        self._report = report
        self._reported: set[str] = set()
        self.stats = FolderStats()

    async def run(self, stop: asyncio.Event, poll_s: float, *, once: bool = False) -> None:
        """Push what is complete, again and again.

        Args:
            stop: Ends it; pushes that wait for capacity end within a second.
            poll_s: Time between two listings, or longer where a listing takes longer.
            once: End when every complete file is pushed and none changes.

        Raises:
            SourceUnavailableError: With `once`, the folder or the ledger cannot be read.
            StageTimeoutError: The folder hangs.
            ConfigError: The server refuses the user.
        """
        tidied_s = -math.inf
        failures = 0
        while not stop.is_set():
            began_s = time.monotonic()
            try:
                if began_s - tidied_s >= _TIDY_S:
                    await _answer(self._tidy)
                    tidied_s = began_s
                handled = await self.run_once(stop)
            except SourceUnavailableError as error:
                if once:
                    raise
                failures += 1
                self._report_once(f"waiting: {error}", error.code)
                await pause(stop, backoff_s(failures))
                continue
            failures = 0
            self._reported.discard(SourceUnavailableError.code)
            if once and not handled and not self.stats.settling:
                return
            if not handled:
                await pause(stop, max(poll_s, time.monotonic() - began_s))

    async def run_once(self, stop: asyncio.Event) -> int:
        """Push what is complete now.

        Returns:
            The number of files pushed or refused.
        """
        listing = await _answer(self._folder.scan, self._ledger.unknown)
        self.stats.settling, self.stats.passed_over = listing.settling, listing.passed_over
        handled = 0
        for batch in _batches(listing.complete):
            if stop.is_set():
                break
            files = await _answer(self._read, batch, listing)
            outcomes = await asyncio.gather(*(self._push(file, stop) for file in files))
            completed = [
                (one.file, one.message_id, refusal)
                for one, refusal in zip(files, outcomes, strict=True)
                if refusal is not None
            ]
            await self._complete(completed, stop)
            handled += len(completed)
        self.stats.settling = listing.settling
        for reason, path in listing.examples.items():
            self._report_once(f"not pushed: {reason}: {shown(path)}; further ones are only counted", reason)
        return handled

    def _read(self, batch: list[FoundFile], listing: Listing) -> list[_ReadFile]:
        files = []
        for file in batch:
            if file.size > self._max_image_bytes:
                files.append(_ReadFile(file, b"", ""))
            elif (data := self._folder.read(file, listing)) is not None:
                files.append(_ReadFile(file, data, message_id(file, data)))
        return files

    async def _push(self, one: _ReadFile, stop: asyncio.Event) -> str | None:
        """Push a file.

        Returns:
            Why it was refused, empty where it was pushed; None where it was stopped before.
        """
        self._metrics.add(m.CAPTURE_FRAMES, category=one.file.category)
        failures = 0
        while True:
            try:
                if not one.message_id:
                    raise MessageError(  # noqa: TRY301 - refused as those that the producer refuses
                        Reason.TOO_LARGE,
                        f"{one.file.size:,} bytes and {self._max_image_bytes:,} are allowed; "
                        "write smaller images or raise limits.max_image_bytes",
                    )
                await self._producer.push(
                    one.data,
                    one.file.category,
                    id=one.message_id,
                    captured_at=_changed_at(one.file),
                    extra={"file": os.fsencode(one.file.path)},
                    wait_s=_WAIT_S,
                )
            except TransientError as error:
                if stop.is_set():
                    return None
                failures += 1
                self._report_once(f"waiting: {error}", error.code)
                await pause(stop, backoff_s(failures))
            except (MessageError, IdConflictError) as error:
                self.stats.refused += 1
                self._metrics.add(m.CAPTURE_REFUSED, category=one.file.category)
                self._report(f"refused: {shown(one.file.path)}: {error}")
                return one_line(error)
            else:
                self._reported -= {"backlog_full", "stream_unavailable"}
                self.stats.pushed += 1
                self.stats.pushed_bytes += len(one.data)
                self._metrics.add(m.CAPTURE_PUSHED, category=one.file.category)
                return ""

    async def _complete(self, completed: list[tuple[FoundFile, str, str]], stop: asyncio.Event) -> None:
        """Record what became of files, then remove those that were pushed.

        Nothing else is pushed until it is recorded: the server knows their ids for ten minutes only.
        """
        failures = 0
        while True:
            try:
                await _answer(self._ledger.record, completed)
                await _answer(self._remove, [(file, name) for file, name, refusal in completed if not refusal])
            except SourceUnavailableError as error:
                if stop.is_set():
                    raise
                failures += 1
                self._report_once(f"waiting: {error}", error.code)
                await pause(stop, backoff_s(failures))
            else:
                return

    def _remove(self, pushed: list[tuple[FoundFile, str]]) -> None:
        if self._dispose is None:
            return
        removed = []
        for file, name in pushed:
            try:
                if self._folder.has(file):
                    self._dispose(file, name)
            except OSError as error:
                self._report_once(
                    f"pushed, and cannot be removed from the folder: {shown(file.path)}: {error.strerror}; "
                    "it is not pushed again, and tried again within an hour",
                    "removal",
                )
            else:
                removed.append(file)
        self._ledger.forget(removed)

    def _tidy(self) -> None:
        """Remove pushed files that still lie in the folder; forget those that are gone.

        Those that are gone are remembered for a day more, and where the folder is empty, which may be a share that is
        not mounted.
        """
        root = self._folder.root
        try:
            if not any(root.iterdir()):
                return
        except OSError:  # the listing reports it
            return
        for page in self._ledger.pages():
            self._remove([(entry.file, entry.message_id) for entry in page if not entry.refusal])
            before_s = time.time() - _REMEMBERED_S
            self._ledger.forget(
                [entry.file for entry in page if entry.at_s < before_s and not self._folder.has(entry.file)]
            )

    def _report_once(self, text: str, about: str) -> None:
        if about not in self._reported:
            self._reported.add(about)
            self._report(text)


def message_id(file: FoundFile, data: bytes) -> str:
    """Derive a file's message id: its path as text, and a digest of path, time of change and bytes."""
    digest = hashlib.blake2b(os.fsencode(file.path) + b"\0%d\0" % file.mtime_ns, digest_size=_DIGEST_BYTES)
    digest.update(data)
    return f"{shown(file.path)[-_MOST_NAME:]}@{digest.hexdigest()}"


def shown(path: str) -> str:
    r"""Write a path as text: bytes that are no UTF-8 as `\xff`, control characters as `\n`."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _changed_at(file: FoundFile) -> datetime | None:
    try:
        return datetime.fromtimestamp(file.mtime_ns / 1e9, UTC)
    except (OverflowError, ValueError):  # a damaged clock or file system
        return None


def _batches(files: list[FoundFile]) -> Iterator[list[FoundFile]]:
    """Yield as many files at a time as may be in memory."""
    batch: list[FoundFile] = []
    size = 0
    for file in files:
        if batch and (len(batch) == _BATCH_FILES or size + file.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.size
    if batch:
        yield batch


async def _answer(call: Callable[..., _T], *args: object) -> _T:
    """Run what may block on the folder in a thread.

    Raises:
        StageTimeoutError: It did not end in time, and the thread hangs.
    """
    try:
        return await asyncio.wait_for(asyncio.to_thread(call, *args), _ANSWER_S)
    except TimeoutError:
        raise StageTimeoutError(f"the folder has not answered for {_ANSWER_S:.0f} s; is its share there?") from None
