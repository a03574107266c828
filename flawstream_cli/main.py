"""The `flawstream` command: commands put together, errors turned into words and exit codes."""

import contextlib
import importlib
import logging
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from flawstream.telemetry import logs
from flawstream_cli.terminal import ExitCode, err, exit_code_of, out, printable
from schemas.errors import FlawstreamError

COMMANDS = {
    "demo": "The main job end to end on photographs of solar cells.",
    "datasets": "Check data sets, list what they hold, and write public ones as folders.",
    "train": "Train every category of a data set, in parallel on Ray.",
    "evaluate": "Measure the current model versions on labelled test images.",
    "serve": "Serve the trained categories until Ctrl-C.",
    "worker": "Judge images from the stream in one process, without Ray.",
    "profile": "Measure where the time of an image goes, stage by stage.",
    "push": "Push images onto the stream.",
    "watch": "Show results as they come.",
    "models": "Look at model versions and promote them.",
    "dead": "Look at dead letters, images that were refused; send them again or throw them away.",
    "acl": "Print a user of the stream server, with the rights its role needs.",
    "doctor": "Check packages, hardware, weights, registry and stream server.",
}
"""Each is a module in `commands`, imported when it is called: a push must not wait until torch and Ray are loaded."""


class _LazyGroup(TyperGroup):
    """Lists commands without importing them, and imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name], rich_markup_mode="markdown")

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load_command(name), rest


def load_command(name: str) -> Any:
    """Import a command or a group of commands; torch and Ray take seconds."""
    with err.status("loading ...") if err.is_terminal else contextlib.nullcontext():
        module = importlib.import_module(f"flawstream_cli.commands.{name}")
    group: typer.Typer | None = getattr(module, "app", None)
    if group is None:
        group = typer.Typer(rich_markup_mode="markdown")
        group.command()(getattr(module, name))
    command = typer.main.get_command(group)
    command.name = name
    return command


app = typer.Typer(
    name="flawstream",
    cls=_LazyGroup,
    help="Anomaly scores, verdicts and maps for images on a Redis stream.",
    epilog="Start with: flawstream demo",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        out.print(version("flawstream"), highlight=False)
        raise typer.Exit


@app.callback()
def flawstream(
    _version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Anomaly scores, verdicts and maps for images on a Redis stream."""


def main() -> None:
    """Run the command line and leave with an exit code that means something."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    try:
        app()
    except FlawstreamError as error:
        _tell_error(f" ({error.code}): {error}")
        sys.exit(exit_code_of(error))
    except OSError as error:
        if error.filename is None:  # not a file that the user named
            raise
        _tell_error(f": {error.filename}: {error.strerror}")
        sys.exit(ExitCode.FAILED)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(ExitCode.INTERRUPTED)


def _tell_error(what: str) -> None:
    if logs.are_json():
        logging.getLogger(__name__).error("error%s", what)
        return
    err.print(Text("error", "bold red") + printable(what), highlight=False, soft_wrap=True)
