"""`flawstream dead`: look at what was refused, and why."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    RedisOption,
    entry_id,
    out,
    print_json,
    read_settings,
    say,
    table,
)
from schemas.keys import StreamKeys
from schemas.settings import Settings
from workers.connection import make_client
from workers.dead_letters import DeadEntry, DeadLetterBox

app = typer.Typer(help="Look at dead letters: images that were refused, and why.", no_args_is_help=True)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, newest first.")] = 20,
    before: Annotated[
        str | None, typer.Option(callback=entry_id, help="Only those older than this id, to page on.")
    ] = None,
    redis: RedisOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, newest first.

    Example: `flawstream dead list -n 5`
    """
    entries, count = asyncio.run(_newest(read_settings(config, redis={"url": redis}), limit, before))
    if as_json:
        for entry in entries:
            print_json(_as_dict(entry))
        return
    columns = ("dead id", "failed at", "reason", "category", "id", "detail")
    rows = (
        (
            entry.entry_id,
            entry.letter.failed_at.isoformat(timespec="seconds"),
            entry.letter.reason,
            _text(entry, b"category"),
            _text(entry, b"id"),
            entry.letter.detail,
        )
        for entry in entries
    )
    if count:
        out.print(table(f"{count} dead letters", columns, rows))
    else:
        say("no dead letters")


@app.command()
def show(
    dead_id: Annotated[str, typer.Argument(callback=entry_id, help="The dead letter's id, as `dead list` shows it.")],
    image: Annotated[Path | None, typer.Option(help="Write the refused image's bytes here.")] = None,
    redis: RedisOption = None,
    config: ConfigOption = None,
) -> None:
    """Print one dead letter as JSON, without the image's bytes.

    Example: `flawstream dead show 1763900000000-0 --image refused.bin`
    """
    entry = asyncio.run(_get(read_settings(config, redis={"url": redis}), dead_id))
    if entry is None:
        say(f"there is no dead letter {dead_id}; `flawstream dead list` shows what there is")
        raise typer.Exit(ExitCode.FAILED)
    if image is not None:
        image.write_bytes(entry.letter.fields.get(b"image", b""))
    print_json(_as_dict(entry))


async def _newest(settings: Settings, limit: int, before: str | None) -> tuple[list[DeadEntry], int]:
    async with make_client(settings.redis) as client:
        box = DeadLetterBox(client, StreamKeys(prefix=settings.redis.prefix))
        return await box.newest(limit, before=before), await box.count()


async def _get(settings: Settings, dead_id: str) -> DeadEntry | None:
    async with make_client(settings.redis) as client:
        return await DeadLetterBox(client, StreamKeys(prefix=settings.redis.prefix)).get(dead_id)


def _as_dict(entry: DeadEntry) -> dict[str, object]:
    letter = entry.letter
    return {
        "dead_id": entry.entry_id,
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
