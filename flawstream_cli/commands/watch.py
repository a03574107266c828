"""`flawstream watch`: prints results as they are published."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flawstream.imaging.maps import decode_map, encode_jpeg, paint
from flawstream_cli.overlays import OverlayFolder
from flawstream_cli.terminal import (
    ConfigOption,
    JsonOption,
    RedisOption,
    entry_id,
    out,
    print_json,
    print_message,
    printable,
    read_settings,
)
from schemas.errors import ConfigError, MessageError
from schemas.messages import DetectionResult, MapCodec, Verdict
from schemas.settings import Settings
from workers.outcomes.results import ResultReader


def watch(
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Stop after so many results; 0: never.")] = 0,
    since: Annotated[
        str,
        typer.Option(
            callback=lambda text: text if text == "$" else entry_id(text),
            help="Start after this entry id; 0: with the oldest, $: with the next new one.",
        ),
    ] = "$",
    maps: Annotated[Path | None, typer.Option(help="Write each anomaly map as a JPEG to this folder.")] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each result as a JPEG of the image's size, with heatmap and boxes."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --save: the original images, by the field `file` or the id. Without: the map alone.",
        ),
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="With --save: the newest so many are kept.")] = 1000,
    redis: RedisOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print results as they are published. Does not affect other readers.

    Example: `flawstream watch --json --maps heatmaps/ | jq 'select(.verdict == "anomalous")'`
    """
    settings = read_settings(config, redis={"url": redis})
    if images is not None and save is None:
        raise typer.BadParameter("--images is for --save DIR")
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images} is not a folder")
    overlays = None if save is None else OverlayFolder(save, images, keep, settings.limits, _warn)
    if maps is not None:
        maps.mkdir(parents=True, exist_ok=True)
    if not as_json:
        print_message(f"waiting for results on {settings.redis.url}; Ctrl-C stops")
    asyncio.run(_watch(settings, count, "0-0" if since == "0" else since, maps, overlays, as_json=as_json))


async def _watch(
    settings: Settings, count: int, since: str, maps: Path | None, overlays: OverlayFolder | None, *, as_json: bool
) -> None:
    printed = 0
    async with ResultReader(settings.redis, after=since) as reader:
        async for name, result in reader:
            if maps is not None:
                _write_map(maps / f"{name}.jpg", result)
            if overlays is not None:
                overlays.write(name, result)
            _show(name, result, as_json=as_json)
            printed += 1
            if printed == count:
                return


def _warn(text: str) -> None:
    print_message(text, "yellow")


def _write_map(file: Path, result: DetectionResult) -> None:
    if result.map.codec is MapCodec.HEATMAP_JPEG:
        file.write_bytes(result.map.data)
    elif result.map.codec is not MapCodec.NONE:
        try:
            file.write_bytes(encode_jpeg(paint(decode_map(result.map), result.threshold)))
        except MessageError as error:  # not written by our workers
            print_message(f"the map of {result.id} cannot be read: {error}", "red")


def _show(name: str, result: DetectionResult, *, as_json: bool) -> None:
    if as_json:
        extra = {name: value.decode("utf-8", "backslashreplace") for name, value in result.extra.items()}
        fields = result.model_dump(mode="json", exclude={"map", "extra"})
        print_json({"entry_id": name, **fields, "map_codec": result.map.codec, "extra": extra})
        return
    style = "bold red" if result.verdict is Verdict.ANOMALOUS else "green"
    line = printable(
        f" {result.category:<16} score {result.score:8.3f} / {result.threshold:.3f}  "
        f"p {result.p_value:.3f}  {result.total_ms:6.0f} ms  {result.id}"
    )
    out.print(Text(f"{result.verdict:<9}", style) + line, highlight=False)
