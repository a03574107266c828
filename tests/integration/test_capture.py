"""`flawstream capture` on a real Valkey: files and frames reach the stream once, and the process ends in order."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers.command_line import clean_environment
from helpers.fakes import png
from helpers.raw_redis import RawRedis
from helpers.scraped import scrape_until
from helpers.streams import rows, single_client
from helpers.waiting import wait_until, wait_until_async
from redis.asyncio import Redis

from flawstream.telemetry import metrics as m
from schemas.errors import SourceUnavailableError, StageTimeoutError
from schemas.keys import StreamKeys
from schemas.settings import BacklogSettings, LimitSettings, RedisSettings
from workers.capture.camera import Camera, Selection
from workers.capture.categories import Categories
from workers.capture.disposal import Deletion, Disposal, Move
from workers.capture.folder import FolderCapture
from workers.capture.frames import Encoding, FrameCapture
from workers.capture.hot_folder import FoundFile, HotFolder
from workers.capture.ledger import Ledger
from workers.produce.producer import Producer

IMAGES = StreamKeys().images
FRAMES = 12


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    async with single_client(redis_settings) as client:
        yield client


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "in"


def write_files(root: Path, count: int) -> list[str]:
    (root / "bottle").mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (root / f"bottle/{k:04}.png").write_bytes(png(k % 256))
    return [f"bottle/{k:04}.png" for k in range(count)]


def images(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*.png"))


def has_pushed(raw: RawRedis, least: int) -> bool:
    return raw.count("XLEN", IMAGES) >= least


def capture_of(
    root: Path,
    ledger: Ledger,
    producer: Producer,
    dispose: Disposal | None = None,
    *,
    max_image_bytes: int = LimitSettings().max_image_bytes,
    report: Callable[[str], None] = lambda _text: None,
) -> FolderCapture:
    folder = HotFolder(root, {".png"}, Categories(), 0.0)
    return FolderCapture(folder, ledger, producer, max_image_bytes, dispose=dispose, report=report)


async def drain(capture: FolderCapture) -> None:
    await capture.run(asyncio.Event(), 0.01, once=True)


@contextmanager
def started(*arguments: object, redis: RedisSettings, max_images: int = 10_000) -> Iterator["subprocess.Popen[str]"]:
    """Run a capture; what still runs at the end is killed."""
    with subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-m", "flawstream_cli", "capture", *map(str, arguments), "--redis", redis.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean_environment(), "FLAWSTREAM_BACKLOG__MAX_IMAGES": str(max_images)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: "subprocess.Popen[str]") -> tuple[list[dict[str, Any]], str]:
    """Wait until a capture has ended well; return its lines of JSON and its messages."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()], err


@pytest.mark.anyio
async def test_a_file_is_pushed_with_category_time_and_path(
    client: Redis, redis_settings: RedisSettings, root: Path
) -> None:
    write_files(root, 1)
    os.utime(root / "bottle/0000.png", (1e9, 1e9))
    async with Producer(redis_settings) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            await drain(capture_of(root, ledger, producer))
    ((_, fields),) = await rows(client, IMAGES)
    assert fields.pop(b"id").startswith(b"bottle/0000.png@")
    assert fields == {
        b"category": b"bottle",
        b"image": png(0),
        b"captured_at": b"2001-09-09T01:46:40+00:00",
        b"file": b"bottle/0000.png",
    }


class _Killed(BaseException):
    """Ends a capture where it is."""


class _KilledLedger(Ledger):
    """A ledger whose process is killed after files were pushed and before any was recorded."""

    def record(self, outcomes: Iterable[tuple[FoundFile, str, str]]) -> None:
        del outcomes
        raise _Killed


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["remembered", "moved", "deleted"])
async def test_a_file_pushed_just_before_a_kill_is_on_the_stream_once(
    client: Redis, redis_settings: RedisSettings, root: Path, how: str
) -> None:
    done = root.parent / "done"
    dispose = {"remembered": None, "moved": Move(root, done), "deleted": Deletion(root)}[how]
    names = write_files(root, 20)
    file = root.parent / "ledger.sqlite"
    async with Producer(redis_settings) as producer:
        with _KilledLedger(file) as ledger, pytest.raises(_Killed):
            await capture_of(root, ledger, producer, dispose).run_once(asyncio.Event())
        assert await client.xlen(IMAGES) == 16  # a batch
        with Ledger(file) as ledger:
            capture = capture_of(root, ledger, producer, dispose)
            await drain(capture)
            assert capture.stats.pushed == 20
            await drain(capture_of(root, ledger, producer, dispose))
    assert sorted(fields[b"file"].decode() for _, fields in await rows(client, IMAGES)) == names
    assert len(images(root)) == (20 if how == "remembered" else 0)
    assert len(images(done)) == (20 if how == "moved" else 0)


def test_killed_again_and_again_it_pushes_each_file_once(redis_settings: RedisSettings, root: Path) -> None:
    names = write_files(root, 400)
    raw = RawRedis(int(redis_settings.url.rsplit(":", 1)[1].split("/")[0]))
    command = ("folder", root, "--ledger", root.parent / "ledger.sqlite", "--settle-s", 0.05, "--once")
    with raw:
        for least, most in ((1, 100), (150, 250)):  # of the backlog, so that it cannot end before it is killed
            with started(*command, redis=redis_settings, max_images=most) as process:
                wait_until(partial(has_pushed, raw, least), "files are pushed", every_s=0.001)
                process.kill()
                process.communicate()
            assert process.returncode == -signal.SIGKILL
        with started(*command, redis=redis_settings) as process:
            (ready, summary), _ = ended(process)
        assert ready["remembered"] + summary["pushed"] == 400
        assert sorted(fields["file"].decode() for _, fields in raw.entries(IMAGES)) == names


def test_sigterm_ends_it_in_order_and_a_file_still_open_is_never_read(
    redis_settings: RedisSettings, root: Path
) -> None:
    write_files(root, 3)
    command = ("folder", root, "--ledger", root.parent / "ledger.sqlite", "--settle-s", 0.05, "--poll-s", 0.05)
    port = int(redis_settings.url.rsplit(":", 1)[1].split("/")[0])
    with RawRedis(port) as raw, (root / "bottle/open.png").open("wb", buffering=0) as writer:
        writer.write(png()[:20])
        with started(*command, "--metrics-port", 0, redis=redis_settings) as process:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            wait_until(lambda: raw.count("XLEN", IMAGES) == 3, "the closed files are pushed")
            writer.write(png()[20:])
            writer.close()
            wait_until(lambda: raw.count("XLEN", IMAGES) == 4, "the file is pushed once it is closed")
            assert {fields["image"] for _, fields in raw.entries(IMAGES)} == {png(0), png(1), png(2), png()}
            scrape_until(ready["metrics"], lambda page: page.total(m.CAPTURE_PUSHED.name, category="bottle") == 4)
            process.terminate()
            (summary,), err = ended(process)
    assert (summary["pushed"], summary["refused"]) == (4, 0)
    assert "open for writing: bottle/open.png" in err


@pytest.mark.anyio
async def test_a_full_backlog_delays_files_and_drops_none(
    client: Redis, redis_settings: RedisSettings, root: Path
) -> None:
    names = write_files(root, 9)
    messages: list[str] = []
    seen: list[str] = []
    async with Producer(redis_settings, backlog=BacklogSettings(max_images=4)) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            running = asyncio.create_task(drain(capture_of(root, ledger, producer, report=messages.append)))
            while not running.done():
                await wait_until_async(
                    lambda: (messages and True) or running.done(), "the backlog is full, or all are pushed"
                )
                for entry_id, fields in await rows(client, IMAGES):
                    seen.append(fields[b"file"].decode())
                    await client.xdel(IMAGES, entry_id)
                await asyncio.sleep(0.01)
            await running
    seen += [fields[b"file"].decode() for _, fields in await rows(client, IMAGES)]
    assert sorted(seen) == names
    assert sum("images wait on" in text for text in messages) >= 1


@pytest.mark.anyio
async def test_with_a_full_backlog_it_stops_at_once_and_goes_on_after_a_restart(
    client: Redis, redis_settings: RedisSettings, root: Path
) -> None:
    names = write_files(root, 9)
    stop = asyncio.Event()
    async with Producer(redis_settings, backlog=BacklogSettings(max_images=4)) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            capture = capture_of(root, ledger, producer, report=lambda _text: stop.set())
            await asyncio.wait_for(capture.run(stop, 0.01), 60)
            assert (capture.stats.pushed, len(ledger)) == (4, 4)
    async with Producer(redis_settings) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            await drain(capture_of(root, ledger, producer))
    assert sorted(fields[b"file"].decode() for _, fields in await rows(client, IMAGES)) == names


@pytest.mark.anyio
async def test_what_the_stream_would_never_take_is_refused_once_and_left_where_it_is(
    client: Redis, redis_settings: RedisSettings, root: Path
) -> None:
    write_files(root, 1)
    (root / "bottle/large.png").write_bytes(bytes(5000))
    messages: list[str] = []
    async with Producer(redis_settings) as producer:
        for _ in range(2):
            with Ledger(root.parent / "ledger.sqlite") as ledger:
                await drain(
                    capture_of(root, ledger, producer, Deletion(root), max_image_bytes=4096, report=messages.append)
                )
    assert images(root) == ["large.png"]
    assert await client.xlen(IMAGES) == 1
    (text,) = messages
    assert text.startswith("refused: bottle/large.png: 5,000 bytes and 4,096 are allowed")


@pytest.mark.anyio
async def test_names_of_any_bytes_reach_the_stream_once_each(
    client: Redis, redis_settings: RedisSettings, root: Path
) -> None:
    (root / "bottle").mkdir(parents=True)
    names = [b"Gr\xfc\xdfe.png", b"Gr\xfc\xdee.png", b"new\nline.png", "Grüße.png".encode(), b"x" * 250 + b".png"]
    for name in names:
        (root / "bottle" / os.fsdecode(name)).write_bytes(png())
    async with Producer(redis_settings) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            await drain(capture_of(root, ledger, producer))
            await drain(capture_of(root, ledger, producer))
    found = [fields for _, fields in await rows(client, IMAGES)]
    assert sorted(fields[b"file"] for fields in found) == sorted(b"bottle/" + name for name in names)
    ids = {fields[b"id"].decode() for fields in found}
    assert len(ids) == len(names)
    assert all(one.isprintable() for one in ids)


@pytest.mark.anyio
async def test_a_file_written_anew_is_another_image(client: Redis, redis_settings: RedisSettings, root: Path) -> None:
    write_files(root, 1)
    async with Producer(redis_settings) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            for second in (1, 2):
                os.utime(root / "bottle/0000.png", (second, second))
                await drain(capture_of(root, ledger, producer))
    assert await client.xlen(IMAGES) == 2


class _FullDisk(Ledger):
    """A ledger that cannot be written a few times."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.failures = 2

    def record(self, outcomes: Iterable[tuple[FoundFile, str, str]]) -> None:
        if self.failures:
            self.failures -= 1
            raise SourceUnavailableError("database or disk is full")
        super().record(outcomes)


@pytest.mark.anyio
async def test_while_the_ledger_cannot_be_written_nothing_more_is_pushed(
    client: Redis, redis_settings: RedisSettings, root: Path
) -> None:
    write_files(root, 20)
    messages: list[str] = []
    async with Producer(redis_settings) as producer:
        with _FullDisk(root.parent / "ledger.sqlite") as ledger:
            capture = capture_of(root, ledger, producer, report=messages.append)
            first = asyncio.create_task(drain(capture))
            await wait_until_async(lambda: messages, "the ledger cannot be written")
            assert await client.xlen(IMAGES) == 16  # a batch
            await first
            assert (capture.stats.pushed, len(ledger)) == (20, 20)
    assert messages == ["waiting: database or disk is full"]
    assert await client.xlen(IMAGES) == 20


@pytest.mark.anyio
async def test_a_pushed_file_that_cannot_be_moved_is_not_pushed_again_and_is_moved_later(
    client: Redis, redis_settings: RedisSettings, root: Path
) -> None:
    write_files(root, 2)
    done = root.parent / "done"
    done.write_bytes(b"no folder")
    messages: list[str] = []
    async with Producer(redis_settings) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            capture = capture_of(root, ledger, producer, Move(root, done), report=messages.append)
            await drain(capture)
            await drain(capture)
            assert (await client.xlen(IMAGES), capture.stats.pushed, len(ledger)) == (2, 2, 2)
            done.unlink()
            await drain(capture)
            assert (await client.xlen(IMAGES), len(ledger)) == (2, 0)
    assert images(done) == ["0000.png", "0001.png"]
    assert len(messages) == 1
    assert "pushed, and cannot be removed from the folder: bottle/0000.png" in messages[0]


@pytest.mark.anyio
async def test_a_folder_that_hangs_ends_the_capture(
    redis_settings: RedisSettings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.capture.folder._ANSWER_S", 0.05)
    write_files(root, 1)
    answer = threading.Event()
    async with Producer(redis_settings) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            capture = capture_of(root, ledger, producer)
            monkeypatch.setattr(HotFolder, "scan", lambda *_: answer.wait())
            with pytest.raises(StageTimeoutError, match="has not answered for"):
                await drain(capture)
            answer.set()


def unmount(root: Path) -> Path:
    away = root.rename(root.parent / "unmounted")
    root.mkdir()
    return away


def mount(away: Path, root: Path) -> None:
    root.rmdir()
    away.rename(root)


@pytest.mark.anyio
async def test_files_that_are_gone_are_forgotten_a_day_later_and_not_where_the_folder_is_empty(
    redis_settings: RedisSettings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(root, 3)
    async with Producer(redis_settings) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            await drain(capture_of(root, ledger, producer))
            (root / "bottle/0000.png").unlink()
            await drain(capture_of(root, ledger, producer))
            assert len(ledger) == 3
            monkeypatch.setattr("workers.capture.folder._REMEMBERED_S", -1.0)
            away = unmount(root)
            await drain(capture_of(root, ledger, producer))
            assert len(ledger) == 3
            mount(away, root)
            await drain(capture_of(root, ledger, producer))
            assert len(ledger) == 2


@pytest.mark.anyio
async def test_a_folder_that_goes_away_and_comes_back_is_read_again(
    client: Redis, redis_settings: RedisSettings, root: Path
) -> None:
    stop = asyncio.Event()
    messages: list[str] = []
    async with Producer(redis_settings) as producer:
        with Ledger(root.parent / "ledger.sqlite") as ledger:
            with pytest.raises(SourceUnavailableError):
                await drain(capture_of(root, ledger, producer))
            running = asyncio.create_task(capture_of(root, ledger, producer, report=messages.append).run(stop, 0.01))
            await wait_until_async(lambda: messages, "the folder is found missing")
            write_files(root, 1)
            await wait_until_async(lambda: client.xlen(IMAGES), "its file is pushed")
            stop.set()
            await running
    assert len(messages) == 1
    assert "cannot be read: No such file" in messages[0]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a video, which ends as the stream of a camera does that is switched off."""
    file = tmp_path_factory.mktemp("video") / "camera.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for k in range(FRAMES):
        writer.write(np.full((48, 64, 3), 20 * k, np.uint8))
    writer.release()
    return file


@pytest.mark.anyio
async def test_frames_are_pushed_in_order_and_the_camera_is_opened_again_when_its_stream_ends(
    client: Redis, redis_settings: RedisSettings, video: Path
) -> None:
    messages: list[str] = []
    camera = Camera(str(video), Selection(count=2 * FRAMES), messages.append)
    async with Producer(redis_settings) as producer:
        capture = FrameCapture(camera, "camera7", "bottle", producer, queue_frames=2 * FRAMES)
        await capture.run(asyncio.Event())
    assert capture.stats.as_dict() == {
        "frames": 2 * FRAMES,
        "pushed": 2 * FRAMES,
        "dropped": 0,
        "refused": 0,
        "reconnects": 1,
    }
    assert messages == ["the camera's stream has ended; it is opened again"]
    found = sorted((fields for _, fields in await rows(client, IMAGES)), key=lambda fields: fields[b"captured_at"])
    times = [datetime.fromisoformat(fields[b"captured_at"].decode()) for fields in found]
    assert all(before < after for before, after in pairwise(times))
    for number, (fields, taken) in enumerate(zip(found, times, strict=True)):
        assert fields[b"id"].decode() == f"camera7-{taken:%Y%m%dT%H%M%S.%f}Z-{number}"
        pixels = cv2.imdecode(np.frombuffer(fields[b"image"], np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        assert pixels.shape == (48, 64, 3)
        assert abs(float(pixels.mean()) - 20 * (number % FRAMES)) < 3
        assert (fields[b"category"], fields[b"camera"]) == (b"bottle", b"camera7")


@pytest.mark.anyio
async def test_one_frame_in_so_many_is_pushed(client: Redis, redis_settings: RedisSettings, video: Path) -> None:
    camera = Camera(str(video), Selection(every=5, count=3), lambda _text: None)
    async with Producer(redis_settings) as producer:
        await FrameCapture(camera, "c", "bottle", producer, encoding=Encoding(png=True)).run(asyncio.Event())
    found = [fields for _, fields in await rows(client, IMAGES)]
    assert sorted(int(fields[b"id"].decode().rsplit("-", 1)[1]) for fields in found) == [0, 5, 10]
    assert all(fields[b"image"].startswith(b"\x89PNG") for fields in found)


@pytest.mark.anyio
async def test_a_full_backlog_refuses_frames_and_drops_the_oldest_and_all_are_counted(
    client: Redis, redis_settings: RedisSettings, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.capture.frames._WAIT_S", 0.05)
    camera = Camera(str(video), Selection(count=FRAMES), lambda _text: None)
    async with Producer(redis_settings, backlog=BacklogSettings(max_images=2)) as producer:
        capture = FrameCapture(camera, "c", "bottle", producer, queue_frames=3)
        await capture.run(asyncio.Event())
    stats = capture.stats
    assert stats.pushed == await client.xlen(IMAGES) == 2
    assert stats.pushed + stats.dropped + stats.refused == stats.frames == FRAMES
    assert stats.refused
    assert stats.dropped


def test_a_camera_that_does_not_answer_is_exit_code_4_and_its_password_is_not_printed(
    redis_settings: RedisSettings, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("s3cr+t\n")
    command = ("rtsp", "rtsp://viewer@127.0.0.1:1/stream1", "-c", "bottle", "--password-file", tmp_path / "password")
    with started(*command, redis=redis_settings) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 4
    assert "error (source_unavailable): the camera does not answer" in err
    ready, summary = map(json.loads, out.splitlines())
    assert (ready["camera"], ready["source"]) == ("127.0.0.1", "rtsp://127.0.0.1:1/stream1")
    assert summary["frames"] == 0
    assert "s3cr" not in out + err
