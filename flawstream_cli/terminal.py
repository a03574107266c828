"""Shared by all commands: output, exit codes, common options, and reading the settings.

Data goes to standard output and messages to standard error, so that a pipe carries data only.
"""

import contextlib
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flawstream.telemetry import logs
from schemas.errors import ClusterLostError, ConfigError, FlawstreamError, TransientError, escaped
from schemas.settings import Settings, load_settings, settings_problems

_log = logging.getLogger(__name__)

_WIDTH = 160
"""Characters a line in a log or a pipe; rich's default of 80 would break the rows of tables."""

out = Console(emoji=False, width=None if sys.stdout.isatty() else _WIDTH)
err = Console(stderr=True, emoji=False, width=None if sys.stderr.isatty() else _WIDTH)


class ExitCode(IntEnum):
    """Exit codes of all commands."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CANNOT_START = 3
    UNAVAILABLE = 4
    CLUSTER_LOST = 5
    INTERRUPTED = 130
    TERMINATED = 143


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of settings; `FLAWSTREAM_SECTION__FIELD` variables override it."),
]
RedisOption = Annotated[
    str | None, typer.Option("--redis", metavar="URL", help="Redis 7 or Valkey server, e.g. redis://127.0.0.1:6379/0.")
]
RegistryOption = Annotated[
    str | None, typer.Option("--registry", metavar="ROOT", help="Folder or fsspec URL of the model registry.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_settings(config: Path | None, **sections: Mapping[str, Any]) -> Settings:
    """Read the settings, override them with the command line's, and set up logging.

    Args:
        config: A YAML file.
        **sections: Fields from the command line by section; None leaves a field as it is.

    Raises:
        ConfigError: The file, the environment, or a value is invalid.
    """
    settings = load_settings(config)
    changed = {}
    for name, fields in sections.items():
        given = {field: value for field, value in fields.items() if value is not None}
        section = getattr(settings, name)
        try:  # unset fields stay unset: `serve` starts its own server only if `redis.url` is unset
            changed[name] = type(section).model_validate({**section.model_dump(exclude_unset=True), **given})
        except ValidationError as error:
            raise ConfigError(
                f"invalid settings on the command line: {settings_problems(error, name)}. "
                "`flawstream doctor --settings` lists every field"
            ) from None
    settings = settings.model_copy(update=changed)
    logs.set_up_logging(settings.logging)
    return settings


def print_json(value: object, file: IO[str] | None = None) -> None:
    """Print one line of JSON on standard output, or to a file; NaN and infinity become null, file names are escaped."""
    file = file or out.file
    file.write(json.dumps(_plain(value), default=escaped, allow_nan=False) + "\n")
    file.flush()


def print_message(text: str, style: str = "") -> None:
    """Print a message on standard error, on one line however long; log it instead if logs are JSON.

    Args:
        text: May contain untrusted text.
        style: A style of rich.
    """
    if logs.are_json():
        _log.info("%s", text)
    else:
        err.print(printable(text), style=style, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def busy(activity: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner while the context lasts; without a terminal, print one line.

    Yields:
        Replaces the spinner's text.
    """
    if err.is_terminal:
        with err.status(printable(f"{activity} ...")) as status:
            yield lambda text: status.update(printable(f"{text} ..."))
    else:
        print_message(f"{activity} ...")
        yield lambda _text: None


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """Build a table; None is shown as a dash, floats with four digits."""
    built = Table(title=printable(title, "bold"), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        built.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        built.add_row(*(_cell(value) for value in row))
    return built


def exit_code_of(error: FlawstreamError) -> ExitCode:
    """Return the exit code for an error."""
    if isinstance(error, ClusterLostError):
        return ExitCode.CLUSTER_LOST
    return ExitCode.UNAVAILABLE if isinstance(error, TransientError) else ExitCode.CANNOT_START


def printable(text: str, style: str = "") -> Text:
    """Make untrusted text safe to print: replaces control characters except new lines, ignores rich's markup.

    Bytes of file names that are not UTF-8 are escaped.
    """
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in escaped(text)
    )
    return Text(shown, style)


def entry_id(text: str | None) -> str | None:
    """Validate the id of a stream entry from the command line.

    Raises:
        typer.BadParameter: The text is not an entry id.
    """
    if text is not None and not _ENTRY_ID.fullmatch(text):
        raise typer.BadParameter(f"{text!r} is no entry id; one looks like 1763900000000-0")
    return text


def dead_id(text: str | None) -> str | None:
    """Validate the id of a dead letter from the command line: an entry id, with shards `SHARD:ENTRY_ID`.

    Raises:
        typer.BadParameter: The text is not the id of a dead letter.
    """
    if text is not None and not _DEAD_ID.fullmatch(text):
        raise typer.BadParameter(f"{text!r} is no id of a dead letter; `flawstream dead list` shows them")
    return text


_ENTRY_ID = re.compile(r"\d{1,20}(-\d{1,20})?")
_DEAD_ID = re.compile(r"(\d{1,4}:)?\d{1,20}-\d{1,20}")


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _cell(value: object) -> Text:
    if value is None:
        return Text("-")
    return printable(f"{value:.4g}" if isinstance(value, float) else str(value))
