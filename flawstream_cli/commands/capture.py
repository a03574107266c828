"""`flawstream capture`: pushes the files of a folder, or the frames of a camera, until it is stopped."""

import asyncio
import hashlib
import os
import re
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol
from urllib.parse import SplitResult, quote, urlsplit

import typer

from flawstream.telemetry.choose_tracer import open_tracer
from flawstream.telemetry.metrics import Metrics
from flawstream.telemetry.prometheus import serve_metrics
from flawstream_cli.terminal import ConfigOption, ExitCode, RedisOption, print_json, print_message, read_settings
from schemas.errors import ConfigError, StageTimeoutError
from schemas.messages import CATEGORY_PATTERN
from schemas.settings import Settings
from training.datasets.folders import IMAGE_SUFFIXES
from workers.capture.camera import Camera, Selection
from workers.capture.categories import Categories
from workers.capture.disposal import Deletion, Disposal, Move
from workers.capture.folder import FolderCapture
from workers.capture.frames import Encoding, FrameCapture
from workers.capture.hot_folder import HotFolder
from workers.capture.ledger import Ledger
from workers.produce.producer import Producer

app = typer.Typer(
    help="Push the images of a folder or a camera as they come, until Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_STATUS_S = 10.0
_MOST_NAME = 200
"""Characters of a camera's name in an id; 256 are allowed for the id."""
_LEDGERS = Path(".flawstream/capture")

MetricsPortOption = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Expose Prometheus metrics at this port of metrics.host.")
]
CategoryOption = Annotated[str, typer.Option("--category", "-c", help="Category whose model judges the frames.")]
FpsOption = Annotated[float | None, typer.Option(min=0.001, help="Push at most so many frames a second.")]
EveryOption = Annotated[int, typer.Option(min=1, help="Push one frame in so many.")]
CountOption = Annotated[int, typer.Option("--count", "-n", min=0, help="Stop after so many frames; 0: never.")]
QualityOption = Annotated[int, typer.Option(min=1, max=100, help="Quality of the JPEGs.")]
PngOption = Annotated[bool, typer.Option("--png", help="Push PNG, without loss, instead of JPEG.")]
QueueOption = Annotated[int, typer.Option(min=1, max=1000, help="Most frames that wait; the oldest is dropped then.")]


@app.command()
def folder(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that images are written to.")],
    category: Annotated[
        str | None,
        typer.Option(
            "--category", "-c", help="One for all files; with --rule a template such as {part}-{line}, of its groups."
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="Regular expression for the path in DIR; its group `(?P<category>...)` is the category."),
    ] = None,
    done: Annotated[Path | None, typer.Option(metavar="DIR", help="Move pushed files to this folder.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete pushed files.")] = False,
    settle_s: Annotated[
        float, typer.Option(min=0.05, help="A file whose size and time have not changed for so long is complete.")
    ] = 1.0,
    poll_s: Annotated[float, typer.Option(min=0.05, help="Time between two listings of the folder.")] = 0.5,
    once: Annotated[bool, typer.Option("--once", help="End when all complete files are pushed.")] = False,
    ledger: Annotated[
        Path | None,
        typer.Option(help=f"SQLite file that remembers what was pushed; by default in {_LEDGERS}, one for each DIR."),
    ] = None,
    metrics_port: MetricsPortOption = None,
    redis: RedisOption = None,
    config: ConfigOption = None,
) -> None:
    r"""Push the images of a folder, each once, as they are written.

    Without --category and --rule, the name of the first subfolder is the category. Pushed files stay and are
    remembered, unless --done or --delete is given. A file that is still written, or has a hidden or temporary name, is
    not read. While the backlog is full, or the server does not answer, it waits. Prints one JSON line to standard
    output when ready, and another at the end.

    Example: `flawstream capture folder /srv/camera7 --rule '(?P<category>\w+)_\d+\.png' --done /srv/camera7-done`
    """
    settings = read_settings(config, redis={"url": redis}, metrics={"port": metrics_port})
    if done is not None and delete:
        raise typer.BadParameter("--done and --delete exclude each other")
    root = directory.resolve()
    if not root.is_dir():
        raise ConfigError(f"{directory} is not a folder")
    dispose = _disposal(root, done, delete=delete)
    hot_folder = HotFolder(
        root, IMAGE_SUFFIXES, Categories(category, rule), settle_s, exclude=done.resolve() if done else None
    )
    name = hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest()
    file = ledger or _LEDGERS / f"{name}.sqlite"
    with Ledger(file) as opened:

        def make(producer: Producer, metrics: Metrics) -> _Running:
            capture = FolderCapture(
                hot_folder,
                opened,
                producer,
                settings.limits.max_image_bytes,
                dispose=dispose,
                metrics=metrics,
                report=print_message,
            )
            return capture.stats, partial(capture.run, poll_s=poll_s, once=once)

        _run(settings, make, {"folder": str(root), "ledger": str(file), "remembered": len(opened)})


@app.command()
def rtsp(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the camera's stream, or anything else FFmpeg reads.")],
    category: CategoryOption,
    name: Annotated[
        str | None, typer.Option(help="Name of the camera, which ids begin with; by default its host.")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(help="File with the password of the URL's user; keeps it out of the command line.")
    ] = None,
    fps: FpsOption = None,
    every: EveryOption = 1,
    count: CountOption = 0,
    quality: QualityOption = 95,
    png: PngOption = False,
    queue: QueueOption = 8,
    metrics_port: MetricsPortOption = None,
    redis: RedisOption = None,
    config: ConfigOption = None,
) -> None:
    """Push the frames of a network camera.

    What the stream does not take in time is dropped, the oldest frame first, and counted. When the camera's stream
    ends it is opened again. Prints one JSON line to standard output when ready, and another at the end. Exit code 4:
    the camera, or the server, does not answer at the start.

    Example: `flawstream capture rtsp rtsp://viewer@camera7/stream1 --password-file camera7.txt -c bottle --fps 2`
    """
    settings = read_settings(config, redis={"url": redis}, metrics={"port": metrics_port})
    parts = _url_parts(url)
    source = url if password_file is None else _with_password(parts, password_file)
    camera = Camera(source, Selection(every, fps, count), print_message)
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()  # a query may hold a password
    _run_camera(settings, camera, shown, name or parts.hostname or "camera", category, Encoding(png, quality), queue)


@app.command()
def usb(
    number: Annotated[int, typer.Argument(metavar="N", min=0, max=255, help="Of the device: 0 is /dev/video0.")],
    category: CategoryOption,
    name: Annotated[
        str | None, typer.Option(help="Name of the camera, which ids begin with; by default HOST-usbN.")
    ] = None,
    fps: FpsOption = None,
    every: EveryOption = 1,
    count: CountOption = 0,
    quality: QualityOption = 95,
    png: PngOption = False,
    queue: QueueOption = 8,
    metrics_port: MetricsPortOption = None,
    redis: RedisOption = None,
    config: ConfigOption = None,
) -> None:
    """Push the frames of a camera of this machine: USB, or any other that Video4Linux knows.

    As `flawstream capture rtsp` in all else.

    Example: `flawstream capture usb 0 -c bottle --every 10 --png`
    """
    settings = read_settings(config, redis={"url": redis}, metrics={"port": metrics_port})
    camera = Camera(number, Selection(every, fps, count), print_message)
    _run_camera(
        settings,
        camera,
        f"/dev/video{number}",
        name or f"{socket.gethostname()}-usb{number}",
        category,
        Encoding(png, quality),
        queue,
    )


class _Stats(Protocol):
    """Counts of a capture."""

    def as_dict(self) -> Mapping[str, Any]:
        """Return the counts as JSON has them."""
        ...


_Running = tuple[_Stats, Callable[[asyncio.Event], Coroutine[Any, Any, None]]]
"""The counts of a capture, and what runs it until an event is set."""


def _run_camera(
    settings: Settings, camera: Camera, shown: str, name: str, category: str, encoding: Encoding, queue: int
) -> None:
    if not re.fullmatch(CATEGORY_PATTERN, category):
        raise ConfigError(f"{category!r} cannot be a category; it must match {CATEGORY_PATTERN}")
    if not 1 <= len(name) <= _MOST_NAME:
        raise ConfigError(f"the camera's name has {len(name)} characters; 1 to {_MOST_NAME} are allowed: --name")

    def make(producer: Producer, metrics: Metrics) -> _Running:
        capture = FrameCapture(
            camera,
            name,
            category,
            producer,
            encoding=encoding,
            queue_frames=queue,
            metrics=metrics,
            report=print_message,
        )
        return capture.stats, capture.run

    _run(settings, make, {"camera": name, "source": shown})


def _run(settings: Settings, make: Callable[[Producer, Metrics], _Running], ready: Mapping[str, Any]) -> None:
    """Run a capture until Ctrl-C or SIGTERM, in order at the first and at once at the second."""
    try:
        asyncio.run(_capture(settings, make, ready))
    except StageTimeoutError as error:
        print_message(str(error), "red")
        os._exit(ExitCode.FAILED)  # an end in order would wait for the thread that hangs


async def _capture(settings: Settings, make: Callable[[Producer, Metrics], _Running], ready: Mapping[str, Any]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number, code in ((signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)):
        loop.add_signal_handler(number, _on_signal, stop, code)
    async with AsyncExitStack() as stack:
        metrics, metrics_url = stack.enter_context(serve_metrics(settings.metrics))
        tracer = stack.enter_context(open_tracer(settings.tracing))
        producer = await stack.enter_async_context(
            Producer(settings.redis, settings.limits, settings.backlog, metrics, tracer=tracer)
        )
        stats, run = make(producer, metrics)
        print_json({**ready, "redis": settings.redis.url, "metrics": metrics_url})
        reporting = asyncio.create_task(_report(stats))
        try:
            await run(stop)
        finally:
            reporting.cancel()
            print_json(stats.as_dict())


def _on_signal(stop: asyncio.Event, code: ExitCode) -> None:
    if stop.is_set():
        os._exit(code)
    stop.set()
    print_message("ending; once more ends at once", "yellow")


async def _report(stats: _Stats) -> None:
    """Print the counts now and then, where they have changed."""
    reported: Mapping[str, Any] = {}
    while True:
        await asyncio.sleep(_STATUS_S)
        counts = stats.as_dict()
        if counts != reported:
            print_message(", ".join(f"{name} {_counted(value)}" for name, value in counts.items() if value))
            reported = counts


def _counted(value: Any) -> str:
    return f"{sum(value.values()):,}" if isinstance(value, Mapping) else f"{value:,}"


def _disposal(root: Path, done: Path | None, *, delete: bool) -> Disposal | None:
    if delete:
        return Deletion(root)
    if done is None:
        return None
    if root.is_relative_to(done.resolve()):
        raise ConfigError(f"--done {done} is the folder itself or holds it: moved files would be pushed again")
    done.mkdir(parents=True, exist_ok=True)
    return Move(root, done.resolve())


def _url_parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"the camera's URL cannot be read: {error}") from None


def _with_password(parts: SplitResult, password_file: Path) -> str:
    """Return the URL with the password of a file."""
    if not parts.username or parts.password:
        raise ConfigError("--password-file needs a URL with a user and no password: rtsp://viewer@camera7/stream1")
    password = quote(password_file.read_text(encoding="utf-8").strip(), safe="")
    return parts._replace(netloc=f"{parts.username}:{password}@{parts.netloc.rpartition('@')[2]}").geturl()
