"""`flawstream push`: pushes image files to the stream, and with --wait shows their results."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import typer
from rich.progress import Progress

from flawstream.telemetry.choose_tracer import open_tracer
from flawstream.telemetry.prometheus import serve_metrics
from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    RedisOption,
    err,
    out,
    print_json,
    print_message,
    read_settings,
    table,
)
from schemas.errors import ConfigError, IdConflictError, MessageError, TransientError, escaped
from schemas.messages import DetectionResult
from schemas.settings import Settings
from training.datasets.folders import IMAGE_SUFFIXES, image_files
from workers.outcomes.results import DeadLetterReader, ResultReader
from workers.produce.producer import Producer

_WAIT_FOR_CAPACITY_S = 60.0


def push(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of images.")],
    category: Annotated[str, typer.Option("--category", "-c", help="Category whose model judges the images.")],
    id_: Annotated[
        str | None, typer.Option("--id", help="Your own id of a single image; to push it again changes nothing.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the results and show them.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="With --wait: longest time without any outcome.")] = 60.0,
    redis: RedisOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Push images to the stream.

    Example: `flawstream push line7/*.png --category bottle --wait`

    Exit code 1: an image was refused, as malformed or because another image has its id; with --wait also, it became a
    dead letter or had no outcome in time. 4: the backlog is full, or the server does not answer; the message names the
    first file that was not pushed.
    """
    settings = read_settings(config, redis={"url": redis})
    files = list(image_files(paths))
    if not files:
        raise ConfigError(f"no images in {', '.join(map(str, paths))}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    if id_ is not None and len(files) != 1:
        raise typer.BadParameter(f"--id is for a single image; there are {len(files)}")
    failed = asyncio.run(_push(files, category, id_, settings, timeout_s if wait else None, as_json=as_json))
    if failed:
        raise typer.Exit(ExitCode.FAILED)


async def _push(
    files: list[Path], category: str, id_: str | None, settings: Settings, timeout_s: float | None, *, as_json: bool
) -> int:
    """Push all files, and with a timeout wait for their outcomes; return the number of failures."""
    failed = 0
    pending: dict[str, Path] = {}
    async with AsyncExitStack() as stack:
        metrics, _ = stack.enter_context(serve_metrics(settings.metrics))
        tracer = stack.enter_context(open_tracer(settings.tracing))
        producer = await stack.enter_async_context(
            Producer(settings.redis, settings.limits, settings.backlog, metrics, tracer=tracer)
        )
        if timeout_s is not None:
            results = await stack.enter_async_context(ResultReader(settings.redis))
            dead = await stack.enter_async_context(DeadLetterReader(settings.redis))
        with _bar() as progress:
            for file in progress.track(files, description="pushing"):
                # two shards may give the same entry id, so with shards each image gets an id
                message_id = id_ or (uuid4().hex if settings.redis.shards else None)
                extra = {"file": escaped(file.name).encode()}
                try:
                    entry_id = await producer.push(
                        file.read_bytes(), category, id=message_id, extra=extra, wait_s=_WAIT_FOR_CAPACITY_S
                    )
                except OSError as error:
                    failed += 1
                    _report_failure(file, "unreadable", error.strerror or str(error), as_json=as_json)
                except (MessageError, IdConflictError) as error:
                    failed += 1
                    reason = error.reason if isinstance(error, MessageError) else error.code
                    _report_failure(file, reason, str(error), as_json=as_json)
                except TransientError as error:
                    if as_json:
                        print_json({"file": str(file), "reason": error.code, "detail": str(error)})
                    print_message(f"{len(pending)} of {len(files)} are pushed; push again from {file} on")
                    raise
                else:
                    pending[message_id or entry_id] = file
                    if timeout_s is None and as_json:
                        print_json({"file": str(file), "entry_id": entry_id})
        if timeout_s is None:
            print_message(f"{len(pending)} pushed. Results: flawstream watch --redis {settings.redis.url}")
            return failed
        return failed + await _await_outcomes(pending, results, dead, timeout_s, as_json=as_json)


async def _await_outcomes(
    pending: dict[str, Path], results: ResultReader, dead: DeadLetterReader, timeout_s: float, *, as_json: bool
) -> int:
    """Wait for the outcomes and print them; return the number of images without a result."""
    completed: list[tuple[Path, DetectionResult]] = []
    failed = 0
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    with _bar() as progress:
        task = progress.add_task("waiting for results", total=len(pending))
        while pending and loop.time() < deadline_s:
            new_results, letters = await asyncio.gather(results.read(), dead.read())
            pending_before = len(pending)
            for _, result in new_results:
                if result.id in pending:
                    file = pending.pop(result.id)
                    completed.append((file, result))
                    if as_json:
                        fields = result.model_dump(mode="json", exclude={"map", "extra"})
                        print_json({"file": str(file), **fields})
            for _, letter in letters:
                message_id = letter.fields.get(b"id", b"").decode("utf-8", "replace") or letter.entry_id
                if message_id in pending:
                    failed += 1
                    _report_failure(pending.pop(message_id), letter.reason, letter.detail, as_json=as_json)
            if len(pending) < pending_before:
                deadline_s = loop.time() + timeout_s
                progress.advance(task, pending_before - len(pending))
    if completed and not as_json:
        columns = ("file", "verdict", "score", "threshold", "p-value", "boxes", "ms")
        rows = (
            (file, r.verdict, r.score, r.threshold, r.p_value, len(r.boxes), round(r.total_ms)) for file, r in completed
        )
        out.print(table("Results", columns, rows))
    for file in pending.values():
        detail = f"no answer within {timeout_s:g} s; is `flawstream serve` running on this server?"
        _report_failure(file, "no_answer", detail, as_json=as_json)
    return failed + len(pending)


def _bar() -> Progress:
    return Progress(console=err, disable=not err.is_terminal, transient=True)


def _report_failure(file: Path, reason: str, detail: str, *, as_json: bool) -> None:
    print_message(f"{file}: {reason}: {detail}", "red")
    if as_json:
        print_json({"file": str(file), "reason": str(reason), "detail": detail})
