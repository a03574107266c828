"""`flawstream profile`: measures the time per image of each stage, on this machine with these models."""

import random
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flawstream.registry.registry import Registry
from flawstream_cli.terminal import (
    ConfigOption,
    JsonOption,
    RegistryOption,
    out,
    print_json,
    print_message,
    read_settings,
    table,
)
from schemas.errors import ConfigError
from training.datasets.folders import IMAGE_SUFFIXES, image_files

if TYPE_CHECKING:
    from flawstream_cli.stage_profile import Layout, Profile

_BAR_CELLS = 24
_STAGES = {
    "read": "reading entries from the stream server",
    "decode": "decoding and resizing",
    "handle": "transfer to the detector's process and back",
    "wait": "in the detector's queue, or in a batch shared with another call",
    "detect": "backbone, flows, scores: the engine is busy",
    "encode": "maps, boxes, building the result",
    "publish": "the script that completes the entries",
}


def profile(
    paths: Annotated[list[Path], typer.Argument(help="Image files of your cameras, or folders of them.")],
    layout: Annotated[Literal["worker", "serve", "both"], typer.Option(help="Where the detector runs.")] = "both",
    images: Annotated[int, typer.Option(min=1, help="Number of images to judge; files are repeated as needed.")] = 512,
    registry: RegistryOption = None,
    engine: Annotated[str | None, typer.Option(help="auto, ncnn, openvino, torch or triton.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the time per image of each stage, from the stream to the result.

    Pushes all images to an embedded server first, with random categories of the registry. Then a worker processes
    them, with the detector in its own process (`worker`, like `flawstream worker`) and behind a Ray Serve handle
    (`serve`, like `flawstream serve`). So the figures are those of a worker that never waits for images.

    Example: `flawstream profile line7/*.jpg --registry models --layout worker`
    """
    settings = read_settings(config, registry={"root": registry}, detector={"engine": engine})
    categories = sorted(Registry(settings.registry.root).currents())
    if not categories:
        raise ConfigError(f"{settings.registry.root} has no model versions; train some with `flawstream train`")
    files = [file.read_bytes() for file in islice(image_files(paths), images)]
    if not files:
        raise ConfigError(f"no images in {', '.join(map(str, paths))}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    work = [(data, categories[k % len(categories)]) for k, data in enumerate(islice(cycle(files), images))]
    random.Random(0).shuffle(work)  # noqa: S311 - an order, not a secret
    from flawstream_cli.stage_profile import measure_stages  # noqa: PLC0415 - torch and Ray take seconds

    layouts: tuple[Layout, ...] = ("worker", "serve") if layout == "both" else (layout,)
    profiles = []
    for each in layouts:
        profiles.append(measure_stages(each, settings, work))
        if not as_json:
            _show(profiles[-1])
    if as_json:
        print_json([each.as_dict() for each in profiles])


def _show(measured: "Profile") -> None:
    title = (
        f"{measured.layout}, engine {measured.engine}: {measured.images / measured.wall_s:.1f} img/s, "
        f"batches of {measured.worker_batch:.1f} (worker) and {measured.detector_batch:.1f} (detector)"
    )
    rows = []
    for name, spent_s in measured.stages_s.items():
        share = spent_s / measured.wall_s
        bar = "\N{FULL BLOCK}" * min(_BAR_CELLS, round(_BAR_CELLS * share))
        rows.append((name, f"{1000 * spent_s / measured.images:.2f}", f"{share:.0%}", bar, _STAGES[name]))
    shown = table(title, ("stage", "ms per image", "of the time", "", "what"), rows)
    shown.columns[3].justify = shown.columns[4].justify = "left"
    out.print(shown)
    if measured.dead_letters:
        print_message(
            f"{measured.dead_letters} of {measured.images} images became dead letters, which take less time to process",
            "yellow",
        )
