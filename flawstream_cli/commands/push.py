"""`flawstream push`: image files onto the stream, and back again with --wait."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    RedisOption,
    err,
    print_json,
    read_settings,
    table,
)
from schemas.errors import ConfigError, MessageError
from schemas.messages import DetectionResult
from schemas.settings import Settings
from training.datasets.mvtec import IMAGE_SUFFIXES
from workers.producer import Producer
from workers.results import DeadLetterReader, ResultReader

_WAIT_FOR_ROOM_S = 60.0


def push(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders to take all images of.")],
    category: Annotated[str, typer.Option("--category", "-c", help="Whose model judges them.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the results and show them.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="With --wait: longest time without any result.")] = 60.0,
    redis: RedisOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Push images onto the stream.

    Example: `flawstream push line7/*.png --category bottle --wait`

    Exit code 1: an image was refused, or with --wait ended as a dead letter or did not end in time.
    """
    settings = read_settings(config, redis={"url": redis})
    files = list(_files(paths))
    if not files:
        raise ConfigError(f"no images in {', '.join(map(str, paths))}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    failed = asyncio.run(_push(files, category, settings, timeout_s if wait else None, as_json=as_json))
    if failed:
        raise typer.Exit(ExitCode.FAILED)


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            yield path


async def _push(files: list[Path], category: str, settings: Settings, timeout_s: float | None, *, as_json: bool) -> int:
    """Push, and wait if asked to; gives the number of images that failed."""
    failed = 0
    pending: dict[str, Path] = {}
    async with AsyncExitStack() as stack:
        producer = await stack.enter_async_context(Producer(settings.redis, settings.limits, settings.backlog))
        results = await stack.enter_async_context(ResultReader(settings.redis))
        dead = await stack.enter_async_context(DeadLetterReader(settings.redis))
        with Progress(console=err, disable=not err.is_terminal, transient=True) as progress:
            task = progress.add_task("pushing", total=len(files))
            for file in files:
                try:
                    data = file.read_bytes()
                    entry_id = await producer.push(
                        data, category, extra={"file": file.name.encode()}, wait_s=_WAIT_FOR_ROOM_S
                    )
                except (OSError, MessageError) as error:
                    failed += 1
                    err.print(f"{file}: {error}", style="red", markup=False)
                else:
                    pending[entry_id] = file
                    if timeout_s is None and as_json:
                        print_json({"file": str(file), "entry_id": entry_id})
                progress.advance(task)
        if timeout_s is None:
            err.print(f"{len(pending)} pushed. Results: flawstream watch --redis {settings.redis.url}")
            return failed
        return failed + await _await_endings(pending, results, dead, timeout_s, as_json=as_json)


async def _await_endings(
    pending: dict[str, Path], results: ResultReader, dead: DeadLetterReader, timeout_s: float, *, as_json: bool
) -> int:
    found: list[tuple[Path, DetectionResult]] = []
    failed = 0
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while pending and loop.time() < deadline_s:
        ended, letters = await asyncio.gather(results.read(), dead.read())
        for _, result in ended:
            if result.id in pending:
                deadline_s = loop.time() + timeout_s
                found.append((pending.pop(result.id), result))
        for _, letter in letters:
            if letter.entry_id in pending:
                deadline_s = loop.time() + timeout_s
                failed += 1
                err.print(
                    f"{pending.pop(letter.entry_id)}: {letter.reason}: {letter.detail}", style="red", markup=False
                )
    if as_json:
        for file, result in found:
            print_json({"file": str(file), **result.model_dump(mode="json", exclude={"map", "extra"})})
    elif found:
        columns = ("file", "verdict", "score", "threshold", "p-value", "boxes", "ms")
        rows = (
            (file, r.verdict, r.score, r.threshold, r.p_value, len(r.boxes), round(r.total_ms)) for file, r in found
        )
        err.print(table("Results", columns, rows))
    for file in pending.values():
        err.print(
            f"{file}: no answer within {timeout_s:g} s; is `flawstream serve` running on this server?", style="red"
        )
    return failed + len(pending)
