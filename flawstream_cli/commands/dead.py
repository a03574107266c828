"""`flawstream dead`: look at what was refused and why, send it again once the cause is mended, or throw it away."""

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
    read_settings,
    say,
    table,
)
from schemas.errors import BacklogFullError, MessageError, Reason
from schemas.settings import Settings
from workers.outcomes.dead_letters import DeadEntry, DeadLetterBox
from workers.redis.connection import make_client

_WAIT_FOR_ROOM_S = 60.0
_PAGE = 8
"""Letters read at once: each may hold an image of many megabytes."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}

app = typer.Typer(
    help="Look at dead letters, images that were refused, and why; send them again or throw them away.",
    no_args_is_help=True,
)

_Ids = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="Dead letters, named as `dead list` shows them.")
]
_ReasonOption = Annotated[Reason | None, typer.Option("--reason", help="Only those with this reason.")]
_YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, newest first.")] = 20,
    before: Annotated[
        str | None, typer.Option(callback=dead_id, help="Only those older than the one with this id, to page on.")
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
        str, typer.Argument(metavar="ID", callback=dead_id, help="The dead letter's id, as `dead list` shows it.")
    ],
    image: Annotated[Path | None, typer.Option(help="Write the refused image's bytes here.")] = None,
    redis: RedisOption = None,
    config: ConfigOption = None,
) -> None:
    """Print one dead letter as JSON, without the image's bytes.

    Example: `flawstream dead show 1763900000000-0 --image refused.bin`
    """
    entry = asyncio.run(_get(read_settings(config, redis={"url": redis}), letter_id))
    if entry is None:
        say(f"there is no dead letter {letter_id}; `flawstream dead list` shows what there is")
        raise typer.Exit(ExitCode.FAILED)
    if image is not None:
        image.write_bytes(entry.letter.fields.get(b"image", b""))
    print_json(_as_dict(entry))


@app.command()
def replay(
    ids: _Ids = None,
    reason: _ReasonOption = None,
    all_: Annotated[bool, typer.Option("--all", help="All that are there now.")] = False,
    yes: _YesOption = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send images again whose cause of refusal is mended: each goes back to the stream and its dead letter goes away.

    A letter goes back once, however often this is called. Where the stream is full, it waits for room up to a minute.

    Example: `flawstream dead replay --reason unknown_category`

    Exit code 1: one of the letters named is not there any more, or is none. 4: no room; the rest stay dead letters.
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
        str | None, typer.Option("--older-than", metavar="AGE", help="All that failed so long ago: 90m, 12h, 7d, 2w.")
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="All that are there now, entries of others on the stream too.")
    ] = False,
    yes: _YesOption = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Throw dead letters away, their images with them.

    Example: `flawstream dead purge --older-than 7d --yes`

    Exit code 1: one of the letters named is not there any more.
    """
    _require_one_choice(ids, reason is not None, older_than is not None, all_)
    latest = None if older_than is None else datetime.now(UTC) - _duration(older_than)
    settings = read_settings(config, redis={"url": redis})
    gone = asyncio.run(_purge(settings, ids or [], reason, latest, yes=yes))
    say(f"{gone:,} dead letters purged")
    if as_json:
        print_json({"purged": gone})
    if ids and gone < len(set(ids)):
        say(f"{len(set(ids)) - gone} of those named were not there: already replayed or purged")
        raise typer.Exit(ExitCode.FAILED)


async def _list(settings: Settings, limit: int, before: str | None, reason: Reason | None, *, as_json: bool) -> None:
    rows = []
    async with _box(settings) as box:
        left = limit
        while left and (page := await box.newest(min(left, _PAGE), before=before, reason=reason)):
            left -= len(page)
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
        say("no dead letters")
        return
    columns = ("dead id", "failed at", "reason", "category", "id", "detail")
    out.print(table(_title(count, reasons), columns, rows))


async def _get(settings: Settings, dead_id: str) -> DeadEntry | None:
    async with _box(settings) as box:
        return await box.get(dead_id)


async def _replay(settings: Settings, ids: list[str], reason: Reason | None, *, yes: bool, as_json: bool) -> int:
    """Send again what is chosen; gives the number of those that could not be."""
    done = failed = 0
    async with _box(settings) as box:
        total = len(ids)
        if not ids and not yes:
            total = await _how_many(box, reason)
            if not total or not _agreed(f"send {total:,} images again"):
                return 0 if not total else 1
        with _bar() as progress:
            task = progress.add_task("replaying", total=total or None)
            async for page in _one_page(ids) if ids else box.walk(reason):
                for dead_id in page:
                    try:
                        entry_id = await box.replay(dead_id, wait_s=_WAIT_FOR_ROOM_S)
                    except MessageError as error:
                        failed += 1
                        _tell(dead_id, str(error), as_json=as_json)
                    except BacklogFullError:
                        say(f"{done:,} replayed; the rest stay dead letters")
                        raise
                    else:
                        done += entry_id is not None
                        if entry_id is None and ids:  # of many, another may have taken one: that is no failure
                            failed += 1
                            _tell(dead_id, "already replayed or purged", as_json=as_json)
                        elif entry_id is not None and as_json:
                            print_json({"dead_id": dead_id, "entry_id": entry_id})
                    progress.advance(task)
    say(f"{done:,} replayed")
    return failed


async def _purge(
    settings: Settings, ids: list[str], reason: Reason | None, latest: datetime | None, *, yes: bool
) -> int:
    """Throw away what is chosen; gives how many there were."""
    async with _box(settings) as box:
        if ids:
            return await box.purge(set(ids))
        if not yes:
            if latest is not None:
                what = f"of {await box.count():,} dead letters purge those from before {latest:%Y-%m-%d %H:%M} UTC"
            else:
                total = await (_how_many(box, reason) if reason else box.count())
                if not total:
                    return 0
                what = f"purge {total:,} dead letters"
            if not _agreed(f"{what}, images and all"):
                raise typer.Exit(ExitCode.FAILED)
        gone = 0
        with _bar() as progress:
            task = progress.add_task("purging", total=None)
            if reason is None:
                async for more in box.purge_until(latest):
                    gone += more
                    progress.update(task, completed=gone)
            else:
                async for page in box.walk(reason):
                    gone += await box.purge(page)
                    progress.update(task, completed=gone)
    return gone


@asynccontextmanager
async def _box(settings: Settings) -> AsyncIterator[DeadLetterBox]:
    async with make_client(settings.redis) as client:
        yield DeadLetterBox(client, settings.redis, settings.backlog)


async def _how_many(box: DeadLetterBox, reason: Reason | None) -> int:
    total = 0
    async for page in box.walk(reason):
        total += len(page)
    if not total:
        say("no dead letters" if reason is None else f"no dead letters with the reason {reason}")
    return total


async def _one_page(ids: list[str]) -> AsyncIterator[list[str]]:
    yield ids


def _agreed(what: str) -> bool:
    try:
        if typer.confirm(f"{what}?", err=True):
            return True
    except typer.Abort:  # nobody there to answer
        say("")
    say("nothing was done; --yes does it without asking")
    return False


def _require_one_choice(ids: list[str] | None, *others: bool) -> None:
    if bool(ids) + sum(others) != 1:
        raise typer.BadParameter("name dead letters by their ids, or choose them by one option; see --help")


def _duration(text: str) -> timedelta:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no age; one looks like 90m, 12h, 7d or 2w")
    try:
        return timedelta(seconds=float(found[1]) * _UNIT_S[found[2]])
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is longer than there are dates") from None


def _title(count: int, reasons: Counter[str]) -> str:
    looked_at = reasons.total()
    shares = ", ".join(f"{number:,} {reason or 'of others'}" for reason, number in reasons.most_common())
    return (
        f"{count:,} dead letters: {shares}"
        if looked_at == count
        else (f"{count:,} dead letters; of the newest {looked_at:,}: {shares}")
    )


def _row(entry: DeadEntry) -> tuple[object, ...]:
    return (
        entry.dead_id,
        entry.letter.failed_at.isoformat(timespec="seconds"),
        entry.letter.reason,
        _text(entry, b"category"),
        _text(entry, b"id"),
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


def _tell(dead_id: str, detail: str, *, as_json: bool) -> None:
    say(f"{dead_id}: {detail}", "red")
    if as_json:
        print_json({"dead_id": dead_id, "detail": detail})


def _bar() -> Progress:
    return Progress(console=err, disable=not err.is_terminal, transient=True)
