"""The `flawstream` command: commands put together, errors turned into words and exit codes."""

import logging
import sys

import typer
from rich.logging import RichHandler

from flawstream_cli.commands import dead, demo, doctor, evaluate, models, push, serve, train, watch
from flawstream_cli.terminal import ExitCode, err, exit_code_of
from schemas.errors import FlawstreamError

app = typer.Typer(
    name="flawstream",
    help="Anomaly scores, verdicts and maps for images on a Redis stream.",
    epilog="Start with: flawstream demo",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo.demo, train.train, evaluate.evaluate, serve.serve, push.push, watch.watch, doctor.doctor):
    app.command()(command)
app.add_typer(models.app, name="models")
app.add_typer(dead.app, name="dead")


def main() -> None:
    """Run the command line and leave with an exit code that means something."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    try:
        app()
    except FlawstreamError as error:
        err.print(f"[bold red]error[/] ({error.code}): ", end="")
        err.print(str(error), markup=False, highlight=False)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(ExitCode.INTERRUPTED)
