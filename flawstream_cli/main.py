"""Entry point of the `flawstream` command: finds the subcommand, prints errors, sets the exit code."""

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
    "demo": "Train, serve and report on photographs of solar cells, end to end.",
    "datasets": "Check data sets, list what they hold, and write public ones as folders.",
    "train": "Train every category of a data set, in parallel on Ray.",
    "evaluate": "Measure the current model versions on labelled test images.",
    "score": "Score stored images into Parquet files.",
    "serve": "Serve the trained categories until Ctrl-C.",
    "worker": "Judge images from the stream in one process, without Ray.",
    "profile": "Measure the time per image of each stage.",
    "push": "Push images to the stream.",
    "capture": "Push the images of a folder or a camera as they come.",
    "watch": "Print results as they are published.",
    "models": "List, promote, export and import model versions.",
    "dead": "List, replay and purge dead letters: images that could not be judged.",
    "acl": "Print an ACL user for the stream server, with only the rights its role needs.",
    "doctor": "Check packages, hardware, weights, registry and stream server.",
}
"""Each is a module in `commands`, imported only when called: `push` must not wait until torch and Ray are imported."""


class _LazyGroup(TyperGroup):
    """Lists commands without importing them; imports only the one that is called."""

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
    """Import a command or a group of commands, which may take seconds (torch, Ray)."""
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


def _print_version(requested: bool) -> None:
    if requested:
        out.print(version("flawstream"), highlight=False)
        raise typer.Exit


@app.callback()
def flawstream(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Anomaly scores, verdicts and maps for images on a Redis stream."""


def main() -> None:
    """Run the command line; exit with an `ExitCode`."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    try:
        app()
    except FlawstreamError as error:
        _print_error(f" ({error.code}): {error}")
        sys.exit(exit_code_of(error))
    except OSError as error:
        if error.filename is None:  # not a file that the user named
            raise
        _print_error(f": {error.filename}: {error.strerror}")
        sys.exit(ExitCode.FAILED)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(ExitCode.INTERRUPTED)


def _print_error(text: str) -> None:
    if logs.are_json():
        logging.getLogger(__name__).error("error%s", text)
        return
    err.print(Text("error", "bold red") + printable(text), highlight=False, soft_wrap=True)
