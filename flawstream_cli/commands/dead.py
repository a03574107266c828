"""`flawstream dead`: list, show, replay and purge dead letters."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    RedisOption,
    dead_id,
    err,
    out,
    print_json,
    print_message,
    read_settings,
    table,
)
from schemas.errors import BacklogFullError, MessageError, Reason
from schemas.settings import Settings
from workers.outcomes.dead_letters import DeadEntry, DeadLetterBox
from workers.redis.connection import make_client

_WAIT_FOR_CAPACITY_S = 60.0
_PAGE = 8
"""Letters read in one call: each may hold an image of many megabytes."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}

app = typer.Typer(
    help="List, replay and purge dead letters: images that could not be judged.",
    no_args_is_help=True,
)

_Ids = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of dead letters, as `dead list` shows them.")
]
_ReasonOption = Annotated[Reason | None, typer.Option("--reason", help="Only those with this reason.")]
_YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Longest list; newest first.")] = 20,
    before: Annotated[
        str | None, typer.Option(callback=dead_id, help="Only those older than this dead letter, for paging.")
    ] = None,
    reason: _ReasonOption = None,
    redis: RedisOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, newest first.

    Example: `flawstream dead list -n 5 --reason unknown_category`
    """
    asyncio.run(_list(read_settings(config, redis={"url": redis}), limit, before, reason, as_json=as_json))


@app.command()
def show(
    letter_id: Annotated[
        str, typer.Argument(metavar="ID", callback=dead_id, help="Id of the dead letter, as `dead list` shows it.")
    ],
    image: Annotated[Path | None, typer.Option(help="Write the image's bytes to this file.")] = None,
    redis: RedisOption = None,
    config: ConfigOption = None,
) -> None:
    """Print one dead letter as JSON, without the image's bytes.

    Example: `flawstream dead show 1763900000000-0 --image refused.bin`
    """
    entry = asyncio.run(_get(read_settings(config, redis={"url": redis}), letter_id))
    if entry is None:
        print_message(f"there is no dead letter {letter_id}; `flawstream dead list` shows all")
        raise typer.Exit(ExitCode.FAILED)
    if image is not None:
        image.write_bytes(entry.letter.fields.get(b"image", b""))
    print_json(_as_dict(entry))


@app.command()
def replay(
    ids: _Ids = None,
    reason: _ReasonOption = None,
    all_: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    yes: _YesOption = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put images back on the images stream, and delete their dead letters, once the cause is fixed.

    A letter is replayed once, however often this is called. While the backlog is full, retries for up to a minute.

    Example: `flawstream dead replay --reason unknown_category`

    Exit code 1: a named letter no longer exists, or cannot be replayed. 4: the backlog is full; the other letters stay.
    """
    _require_one_choice(ids, reason is not None, all_)
    settings = read_settings(config, redis={"url": redis})
    if asyncio.run(_replay(settings, ids or [], reason, yes=yes, as_json=as_json)):
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def purge(
    ids: _Ids = None,
    reason: _ReasonOption = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="All older than this: 90m, 12h, 7d, 2w.")
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="All entries, including those that flawstream did not write.")
    ] = False,
    yes: _YesOption = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete dead letters, with their images.

    Example: `flawstream dead purge --older-than 7d --yes`

    Exit code 1: a named letter no longer exists.
    """
    _require_one_choice(ids, reason is not None, older_than is not None, all_)
    latest = None if older_than is None else datetime.now(UTC) - _duration(older_than)
    settings = read_settings(config, redis={"url": redis})
    purged = asyncio.run(_purge(settings, ids or [], reason, latest, yes=yes))
    print_message(f"{purged:,} dead letters purged")
    if as_json:
        print_json({"purged": purged})
    if ids and purged < len(set(ids)):
        print_message(f"{len(set(ids)) - purged} of those named do not exist: already replayed or purged")
        raise typer.Exit(ExitCode.FAILED)


async def _list(settings: Settings, limit: int, before: str | None, reason: Reason | None, *, as_json: bool) -> None:
    rows = []
    async with _open_box(settings) as box:
        remaining = limit
        while remaining and (page := await box.newest(min(remaining, _PAGE), before=before, reason=reason)):
            remaining -= len(page)
            before = page[-1].dead_id
            for entry in page:
                if as_json:
                    print_json(_as_dict(entry))
                else:
                    rows.append(_row(entry))
        if as_json:
            return
        count = await box.count()
        reasons = await box.reasons()
    if not count:
        print_message("no dead letters")
        return
    columns = ("dead id", "failed at", "reason", "category", "id or file", "detail")
    out.print(table(_title(count, reasons), columns, rows))


async def _get(settings: Settings, dead_id: str) -> DeadEntry | None:
    async with _open_box(settings) as box:
        return await box.get(dead_id)


async def _replay(settings: Settings, ids: list[str], reason: Reason | None, *, yes: bool, as_json: bool) -> int:
    """Replay the chosen letters; return the number of failures."""
    replayed = failed = 0
    async with _open_box(settings) as box:
        total = len(ids)
        if not ids and not yes:
            total = await _count(box, reason)
            if not total or not _confirm(f"replay {total:,} images"):
                return 0 if not total else 1
        with _bar() as progress:
            task = progress.add_task("replaying", total=total or None)
            async for page in _single_page(ids) if ids else box.walk(reason):
                for dead_id in page:
                    try:
                        entry_id = await box.replay(dead_id, wait_s=_WAIT_FOR_CAPACITY_S)
                    except MessageError as error:
                        failed += 1
                        _report_failure(dead_id, str(error), as_json=as_json)
                    except BacklogFullError:
                        print_message(f"{replayed:,} replayed; the rest stay dead letters")
                        raise
                    else:
                        replayed += entry_id is not None
                        if entry_id is None and ids:  # without ids, another replay at the same time is no failure
                            failed += 1
                            _report_failure(dead_id, "already replayed or purged", as_json=as_json)
                        elif entry_id is not None and as_json:
                            print_json({"dead_id": dead_id, "entry_id": entry_id})
                    progress.advance(task)
    print_message(f"{replayed:,} replayed")
    return failed


async def _purge(
    settings: Settings, ids: list[str], reason: Reason | None, latest: datetime | None, *, yes: bool
) -> int:
    """Purge the chosen letters; return how many there were."""
    async with _open_box(settings) as box:
        if ids:
            return await box.purge(set(ids))
        if not yes:
            if latest is not None:
                question = f"purge those of {await box.count():,} dead letters from before {latest:%Y-%m-%d %H:%M} UTC"
            else:
                total = await (_count(box, reason) if reason else box.count())
                if not total:
                    return 0
                question = f"purge {total:,} dead letters"
            if not _confirm(f"{question}, with their images"):
                raise typer.Exit(ExitCode.FAILED)
        purged = 0
        with _bar() as progress:
            task = progress.add_task("purging", total=None)
            if reason is None:
                async for count in box.purge_until(latest):
                    purged += count
                    progress.update(task, completed=purged)
            else:
                async for page in box.walk(reason):
                    purged += await box.purge(page)
                    progress.update(task, completed=purged)
    return purged


@asynccontextmanager
async def _open_box(settings: Settings) -> AsyncIterator[DeadLetterBox]:
    async with make_client(settings.redis) as client:
        yield DeadLetterBox(client, settings.redis, settings.backlog)


async def _count(box: DeadLetterBox, reason: Reason | None) -> int:
    total = 0
    async for page in box.walk(reason):
        total += len(page)
    if not total:
        print_message("no dead letters" if reason is None else f"no dead letters with the reason {reason}")
    return total


async def _single_page(ids: list[str]) -> AsyncIterator[list[str]]:
    yield ids


def _confirm(question: str) -> bool:
    try:
        if typer.confirm(f"{question}?", err=True):
            return True
    except typer.Abort:  # standard input is closed
        print_message("")
    print_message("nothing was done; --yes skips this question")
    return False


def _require_one_choice(ids: list[str] | None, *others: bool) -> None:
    if bool(ids) + sum(others) != 1:
        raise typer.BadParameter("give ids of dead letters, or one option that chooses them; see --help")


def _duration(text: str) -> timedelta:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no age; one looks like 90m, 12h, 7d or 2w")
    try:
        return timedelta(seconds=float(match[1]) * _UNIT_S[match[2]])
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is too long") from None


def _title(count: int, reasons: Counter[str]) -> str:
    sampled = reasons.total()
    shares = ", ".join(f"{number:,} {reason or 'without a reason'}" for reason, number in reasons.most_common())
    return (
        f"{count:,} dead letters: {shares}"
        if sampled == count
        else f"{count:,} dead letters; of the newest {sampled:,}: {shares}"
    )


def _row(entry: DeadEntry) -> tuple[object, ...]:
    return (
        entry.dead_id,
        entry.letter.failed_at.isoformat(timespec="seconds"),
        entry.letter.reason,
        _text(entry, b"category"),
        _text(entry, b"id") or _text(entry, b"file"),
        entry.letter.detail,
    )


def _as_dict(entry: DeadEntry) -> dict[str, object]:
    letter = entry.letter
    return {
        "dead_id": entry.dead_id,
        "entry_id": letter.entry_id,
        "reason": letter.reason,
        "detail": letter.detail,
        "deliveries": letter.deliveries,
        "failed_at": letter.failed_at.isoformat(),
        "image_bytes": len(letter.fields.get(b"image", b"")),
        "fields": {
            name.decode("utf-8", "backslashreplace"): value.decode("utf-8", "backslashreplace")[:256]
            for name, value in letter.fields.items()
            if name != b"image"
        },
    }


def _text(entry: DeadEntry, field: bytes) -> str:
    return entry.letter.fields.get(field, b"").decode("utf-8", "backslashreplace")[:40]


def _report_failure(dead_id: str, detail: str, *, as_json: bool) -> None:
    print_message(f"{dead_id}: {detail}", "red")
    if as_json:
        print_json({"dead_id": dead_id, "detail": detail})


def _bar() -> Progress:
    return Progress(console=err, disable=not err.is_terminal, transient=True)
