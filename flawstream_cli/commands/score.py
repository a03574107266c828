"""`flawstream score`: scores stored images into Parquet files, over a Ray cluster."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Self

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flawstream.registry.registry import Registry
from flawstream_cli.cluster import on_cluster
from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    RegistryOption,
    err,
    print_json,
    print_message,
    read_settings,
)
from schemas.errors import ConfigError
from schemas.messages import MapCodec
from schemas.settings import Settings
from training.datasets.folders import IMAGE_SUFFIXES

_REPORT_S = 10.0


def score(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="A folder, a pattern with * or **, a list of paths (.txt or .parquet), or s3://bucket/folder.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", metavar="URL", help="Folder for the results, e.g. results.parquet.")],
    category: Annotated[str | None, typer.Option("--category", "-c", help="The category of all images.")] = None,
    category_from: Annotated[
        str | None,
        typer.Option(
            "--category-from",
            metavar="SOURCE",
            help="Instead: `folder`, the first folder below URL, or the name of a column of a Parquet list.",
        ),
    ] = None,
    maps: Annotated[MapCodec, typer.Option(help="Write anomaly maps too, encoded as in results.")] = MapCodec.NONE,
    images_per_part: Annotated[
        int, typer.Option(min=1, max=100_000, help="Images of one file; what is lost at most when a process is killed.")
    ] = 500,
    again: Annotated[bool, typer.Option("--again", help="Remove the results in OUT and start anew.")] = False,
    registry: RegistryOption = None,
    engine: Annotated[str | None, typer.Option(help="auto, cuda, ncnn, openvino, torch or triton.")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", envvar="RAY_ADDRESS", help="A Ray cluster; by default only this machine."
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score stored images as a stream worker would, and write Parquet files. The same command again continues.

    Each image is one row: path, category, model, score, p-value, threshold, verdict, boxes, size; or, if it could not
    be judged, the error and its text. Images are listed and model versions chosen once, at the start.

    Example: `flawstream score s3://archive/line7 --category bottle --out results.parquet`

    Exit code 1: some images could not be judged. 3: nothing could start. 4: the storage or a detector does not answer.
    """
    if (category is None) == (category_from is None):
        raise typer.BadParameter("give either --category or --category-from")
    _require_ray_data()
    from flawstream.storage import Location  # noqa: PLC0415 - the same
    from serving.scoring.job import score_parts  # noqa: PLC0415 - needs an optional extra
    from serving.scoring.output import Output, RunParameters  # noqa: PLC0415 - the same
    from serving.scoring.start import open_run  # noqa: PLC0415 - the same

    settings = _with_absolute_weights(read_settings(config, registry={"root": registry}, detector={"engine": engine}))
    parameters = RunParameters(
        url=Location.of(url).url,
        suffixes=tuple(sorted(IMAGE_SUFFIXES)),
        category=category,
        category_from=category_from,
        registry=Location.of(settings.registry.root).url,
        maps=maps,
        images_per_part=images_per_part,
        engine=settings.detector.engine,
        device=settings.detector.device,
        precision=settings.detector.precision,
        limits=settings.limits.model_dump(),
    )
    output = Output(out)
    run, resumed = open_run(output, parameters, again=again)
    finished = output.finished()
    parts = [part for part in range(run.parts) if part not in finished]
    already = sum(run.images_in(part) for part in finished)
    if resumed:
        _report_resumed(run.versions, run.listed_at.isoformat(" ", "minutes"), settings, already, run.images)
    counts = output.count(finished)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it logs as errors what Ray Data does on purpose
    began_s = time.perf_counter()
    with _resumable(output.url), contextlib.ExitStack() as stack:
        if parts:
            stack.enter_context(on_cluster(ray_address))
        stack.enter_context(_terminable())
        display = stack.enter_context(_Display(run.images, already))
        for scored in score_parts(output, run, settings, parts):
            counts.update(images=scored.images, failed=scored.failed, anomalous=scored.anomalous)
            display.show(counts["images"], counts["failed"])
    duration_s = time.perf_counter() - began_s
    if missing := run.parts - len(output.finished()):
        raise ConfigError(
            f"{missing} parts that were written are not in {output.url} on this machine; every node of the cluster "
            "must see the folder of --out under the same path: choose a shared folder or an object store"
        )
    output.remove_unfinished()
    scored_now = run.images - already
    if as_json:
        print_json(
            {
                "out": output.url,
                **counts,
                "scored_now": scored_now,
                "versions": run.versions,
                "duration_s": round(duration_s, 3),
            }
        )
    else:
        print_message(
            f"{counts['images']:,} images: {counts['anomalous']:,} anomalous, {counts['failed']:,} not judged; "
            f"{scored_now:,} scored now in {duration_s:.0f} s"
        )
        print_message(f"results: {output.url}")
    if counts["failed"]:
        print_message(f"{counts['failed']:,} images were not judged; the columns error and error_detail say why", "red")
        raise typer.Exit(ExitCode.FAILED)


def _require_ray_data() -> None:
    missing = [name for name in ("pyarrow", "pandas") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"flawstream score needs {' and '.join(missing)}; pip install 'flawstream[batch]'")


def _with_absolute_weights(settings: Settings) -> Settings:
    """Make the path of a backbone's weights absolute, since actors have other working directories."""
    weights = Path(settings.model.weights)
    if not weights.is_file():
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"weights": str(weights.absolute())})})


def _report_resumed(versions: dict[str, str], listed_at: str, settings: Settings, already: int, images: int) -> None:
    print_message(f"continuing: {already:,} of {images:,} images are scored; they were listed on {listed_at}")
    currents = Registry(settings.registry.root).currents()
    for category, version in versions.items():
        if (current := currents.get(category)) != version:
            print_message(
                f"{category}: the run goes on with {version}, with which it began; {current} is current now "
                "(--again scores all with that)",
                "yellow",
            )


@contextlib.contextmanager
def _resumable(out: str) -> Iterator[None]:
    """Say how to continue where scoring is stopped from outside."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print_message(f"stopped; what is scored is in {out}: run the same command again to continue")
        raise


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """End in order on SIGTERM."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        sys.exit(ExitCode.TERMINATED)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Display:
    """Shows how many images are scored: a bar on a terminal, else a line every ten seconds. A context manager.

    Args:
        images: All images.
        already: Those scored by an earlier run.
    """

    def __init__(self, images: int, already: int) -> None:
        self._bar = Progress(
            TextColumn("[bold]scoring"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
            speed_estimate_period=600,
        )
        self._images, self._already = images, already
        self._task = self._bar.add_task("scoring", total=images, completed=already, note="")
        self._began_s = self._reported_s = time.perf_counter()

    def show(self, done: int, failed: int) -> None:
        """Show the counts.

        Args:
            done: Images scored, those of an earlier run too.
            failed: Those that were not judged.
        """
        now_s = time.perf_counter()
        rate = (done - self._already) / max(now_s - self._began_s, 1e-9)
        note = f"{rate:.0f} images/s" + (f", {failed:,} not judged" if failed else "")
        self._bar.update(self._task, completed=done, note=note)
        if not err.is_terminal and (now_s - self._reported_s >= _REPORT_S or done == self._images):
            self._reported_s = now_s
            left_s = (self._images - done) / max(rate, 1e-9)
            print_message(f"{done:,} of {self._images:,} images, {note}, about {left_s:.0f} s left")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
