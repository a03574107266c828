"""What all commands share towards the terminal: where output goes, exit codes, options, and settings put together.

Data goes to standard output, everything for a person to standard error, so that a pipe carries data alone.
"""

import contextlib
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flawstream.telemetry import logs
from schemas.errors import ConfigError, FlawstreamError, TransientError
from schemas.settings import Settings, load_settings, settings_problems

_log = logging.getLogger(__name__)

_WIDTH = 160
"""Where nobody watches, as in a log or a pipe; rich takes 80 there and breaks the rows of tables."""

out = Console(emoji=False, width=None if sys.stdout.isatty() else _WIDTH)
err = Console(stderr=True, emoji=False, width=None if sys.stderr.isatty() else _WIDTH)


class ExitCode(IntEnum):
    """What a command's exit code means."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CANNOT_START = 3
    UNAVAILABLE = 4
    INTERRUPTED = 130


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of settings; `FLAWSTREAM_SECTION__FIELD` variables win over it."),
]
RedisOption = Annotated[
    str | None, typer.Option("--redis", metavar="URL", help="Redis 7 or Valkey server, e.g. redis://127.0.0.1:6379/0.")
]
RegistryOption = Annotated[
    str | None, typer.Option("--registry", metavar="ROOT", help="Folder or fsspec URL of the model versions.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def read_settings(config: Path | None, **sections: Mapping[str, Any]) -> Settings:
    """Read the settings, put what the command line says above them, and log as they ask from here on.

    Args:
        config: A YAML file.
        **sections: Per section the fields given on the command line; None stands for not given.

    Raises:
        ConfigError: The file, the environment, or a value is wrong.
    """
    settings = load_settings(config)
    changed = {}
    for name, fields in sections.items():
        given = {field: value for field, value in fields.items() if value is not None}
        section = getattr(settings, name)
        try:  # what was never set stays so: `serve` starts its own server only where nobody named one
            changed[name] = type(section).model_validate({**section.model_dump(exclude_unset=True), **given})
        except ValidationError as error:
            raise ConfigError(
                f"the command line's settings are refused: {settings_problems(error, name)}. "
                "`flawstream doctor --settings` lists every field"
            ) from None
    read = settings.model_copy(update=changed)
    logs.set_up_logging(read.logging)
    return read


def print_json(value: object) -> None:
    """Print one line of JSON on standard output; a number that JSON does not know becomes null."""
    out.file.write(json.dumps(_finite(value), default=str, allow_nan=False) + "\n")
    out.file.flush()


def say(text: str, style: str = "") -> None:
    """Tell a person something that may hold text from outside, on one line however long; where logs are JSON, there."""
    if logs.are_json():
        _log.info("%s", text)
    else:
        err.print(printable(text), style=style, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def busy(doing: str) -> Iterator[None]:
    """Show that something goes on: a spinner, or a line where nobody watches."""
    if err.is_terminal:
        with err.status(printable(f"{doing} ...")):
            yield
    else:
        say(f"{doing} ...")
        yield


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """Build a table; None shows as a dash, floats with four digits."""
    built = Table(title=printable(title, "bold"), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        built.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        built.add_row(*(_cell(value) for value in row))
    return built


def exit_code_of(error: FlawstreamError) -> ExitCode:
    """Tell how a command ends on an error."""
    return ExitCode.UNAVAILABLE if isinstance(error, TransientError) else ExitCode.CANNOT_START


def printable(text: str, style: str = "") -> Text:
    """Make text from outside harmless: no control characters for the terminal but new lines, no markup for rich."""
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return Text(shown, style)


def entry_id(text: str | None) -> str | None:
    """Check an entry's id from the command line.

    Raises:
        typer.BadParameter: It is none.
    """
    if text is not None and not _ENTRY_ID.fullmatch(text):
        raise typer.BadParameter(f"{text!r} is no entry id; one looks like 1763900000000-0")
    return text


def dead_id(text: str | None) -> str | None:
    """Check a dead letter's id from the command line: with shards the shard's number and a colon stand before it.

    Raises:
        typer.BadParameter: It is none.
    """
    if text is not None and not _DEAD_ID.fullmatch(text):
        raise typer.BadParameter(f"{text!r} is no id of a dead letter; `flawstream dead list` shows them")
    return text


_ENTRY_ID = re.compile(r"\d{1,20}(-\d{1,20})?")
_DEAD_ID = re.compile(r"(\d{1,4}:)?\d{1,20}-\d{1,20}")


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def _cell(value: object) -> Text:
    if value is None:
        return Text("-")
    return printable(f"{value:.4g}" if isinstance(value, float) else str(value))
