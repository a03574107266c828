"""`flawstream models`: look at the registry, choose what is served, bring versions in and out."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from flawstream.registry.registry import Registry
from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    RegistryOption,
    busy,
    out,
    print_json,
    read_settings,
    say,
    table,
)
from schemas.errors import RegistryError, UnknownCategoryError
from schemas.manifest import ModelManifest
from schemas.settings import Resize

app = typer.Typer(help="Look at model versions and promote them.", no_args_is_help=True)


@app.command("list")
def list_(
    category: Annotated[str | None, typer.Argument(help="Only this one's versions.")] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List versions; a star marks the current one.

    Example: `flawstream models list bottle`

    Exit code 1: a version is damaged; the others are listed.
    """
    settings = read_settings(config, registry={"root": registry})
    opened = Registry(settings.registry.root)
    currents = opened.currents()
    categories = [category] if category else opened.categories()
    manifests: list[ModelManifest] = []
    damaged: list[RegistryError] = []
    for name, version in ((one, version) for one in categories for version in opened.versions(one)):
        try:
            manifests.append(opened.manifest(name, version))
        except RegistryError as error:
            damaged.append(error)
    _show(manifests, currents, settings.registry.root, as_json=as_json)
    for why in damaged:
        say(str(why), "red")
    if damaged:
        raise typer.Exit(ExitCode.FAILED)


def _show(manifests: list[ModelManifest], currents: dict[str, str], root: str, *, as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {**m.model_dump(mode="json", exclude={"calibration"}), "current": currents.get(m.category) == m.version}
                for m in manifests
            ]
        )
        return
    if not manifests:
        say(f"no versions in {root}; make some with `flawstream train`")
        return
    columns = ("category", "version", "current", "backbone", "input", "train images", "AUROC", "threshold")
    rows = (
        (
            m.category,
            m.version,
            "*" if currents.get(m.category) == m.version else "",
            m.backbone.name,
            m.backbone.input_size,
            m.training.train_images,
            m.serving_metrics.image_auroc,
            m.calibration.threshold,
        )
        for m in manifests
    )
    out.print(table(root, columns, rows))


@app.command()
def show(
    category: Annotated[str, typer.Argument(help="The category.")],
    version: Annotated[str | None, typer.Argument(help="The version; the current one if absent.")] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Print a version's manifest as JSON.

    Example: `flawstream models show bottle | jq .metrics`
    """
    settings = read_settings(config, registry={"root": registry})
    opened = Registry(settings.registry.root)
    chosen = version or _current(opened, category, settings.registry.root)
    print_json(opened.manifest(category, chosen).model_dump(mode="json"))


def _current(registry: Registry, category: str, root: str) -> str:
    version = registry.current(category)
    if version is None:
        raise UnknownCategoryError(
            f"category {category!r} has no current version in {root}; `flawstream models list` shows what there is"
        )
    return version


@app.command()
def promote(
    category: Annotated[str, typer.Argument(help="The category.")],
    version: Annotated[str, typer.Argument(help="The version to serve from now on; also an older one, to roll back.")],
    other_backbone: Annotated[
        bool, typer.Option("--other-backbone", help="Also on another backbone than other categories' current versions.")
    ] = False,
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a version current. Running services pick it up within seconds.

    One service runs one backbone, so a version on another one than the current versions of other categories is refused.
    `--other-backbone` is for someone who moves all categories, one after the other, and then restarts the service.

    Example: `flawstream models promote bottle 20261123-134500-1a2b3c4d`
    """
    settings = read_settings(config, registry={"root": registry})
    Registry(settings.registry.root).promote(category, version, other_backbone=other_backbone)
    say(f"{category}@{version} is current")


@app.command()
def presets(as_json: JsonOption = False) -> None:
    """List the configurations by name that `model.preset` and `flawstream train --preset` take, and their size.

    Example: `flawstream models presets`
    """
    from flawstream_cli.preset_sizes import preset_sizes  # noqa: PLC0415 - torch takes seconds; `list` needs none

    with busy("counting"):
        sizes = preset_sizes()
    if as_json:
        print_json([asdict(size) for size in sizes])
        return
    out.print(table("Presets", sizes[0].columns(), (size.cells() for size in sizes)))


@app.command()
def export(
    version: Annotated[
        str, typer.Argument(metavar="CATEGORY[@VERSION]", help="What to write; without a version the current one.")
    ],
    kind: Annotated[Literal["onnx", "openvino", "triton"], typer.Option("--format", help="For whom.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to; for triton the model repository.")],
    score: Annotated[bool, typer.Option(help="The image score comes out beside the grids.")] = True,
    map_: Annotated[bool, typer.Option("--map/--no-map", help="The map comes out at the size of the image.")] = False,
    backend: Annotated[
        Literal["onnxruntime", "python"],
        typer.Option(help="triton: what runs the networks; python for a server without the onnxruntime backend."),
    ] = "onnxruntime",
    max_batch: Annotated[int, typer.Option(min=1, help="triton: most images in a batch.")] = 32,
    instances: Annotated[int, typer.Option(min=1, help="triton: copies of a network that run at once.")] = 1,
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Write a version for another program: uint8 images in, anomaly grids out, preprocessing inside.

    Example: `flawstream models export bottle --format onnx --to exported`
    """
    from flawstream.export.triton import TritonOptions  # noqa: PLC0415 - torch takes seconds; `list` needs none
    from flawstream.export.version import ExportFormat, ExportOptions, export_version  # noqa: PLC0415 - the same

    settings = read_settings(config, registry={"root": registry})
    opened = Registry(settings.registry.root)
    category, _, named = version.partition("@")
    manifest = opened.manifest(category, named or _current(opened, category, settings.registry.root))
    with busy(f"writing {manifest.model}"):
        target = export_version(
            opened,
            manifest,
            settings.model,
            ExportFormat(kind),
            folder=to,
            options=ExportOptions(
                score=score,
                map=map_,
                triton=TritonOptions(backend=backend, max_batch_images=max_batch, instances=instances),
            ),
        )
    out.print(str(target), highlight=False, soft_wrap=True)


@app.command("import-anomalib")
def import_anomalib(
    checkpoint: Annotated[
        Path, typer.Argument(help="A Lightning .ckpt of anomalib's Fastflow, or its state dict (.pt, .safetensors).")
    ],
    category: Annotated[str, typer.Option("--category", "-c", help="Whose version it becomes.")],
    data: Annotated[
        Path, typer.Option(help="Folder of normal images that did not train the model: they set the threshold.")
    ],
    backbone: Annotated[
        str, typer.Option(help="auto: found by the tensors; or one of anomalib's, by timm's name.")
    ] = "auto",
    resize: Annotated[
        Resize, typer.Option(help="antialias: images are resized as in anomalib; area: as models trained here.")
    ] = "antialias",
    false_alarm_rate: Annotated[float | None, typer.Option(help="Share of normal parts that may be rejected.")] = None,
    promote: Annotated[bool, typer.Option(help="Make the new version current as well.")] = False,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version of a FastFlow model that anomalib trained.

    The checkpoint is read as tensors alone; a pickle is never executed. Everything else is inferred from the tensors,
    and the backbone's weights come along. A version without a threshold cannot judge, and a threshold set on images
    that trained the model is too low: hence `--data`. The version serves once it is promoted.

    Example: `flawstream models import-anomalib model.ckpt -c bottle --data bottle/held-out`
    """
    from flawstream.fastflow.anomalib import read_anomalib  # noqa: PLC0415 - torch takes seconds; `list` needs none
    from flawstream_cli.training_display import TrainingDisplay  # noqa: PLC0415 - the same
    from training.imports import ImportJob, run_import  # noqa: PLC0415 - the same

    settings = read_settings(config, registry={"root": registry}, training={"false_alarm_rate": false_alarm_rate})
    with busy(f"reading {checkpoint}"):
        model = read_anomalib(checkpoint, backbone, resize)
    say(f"found: {model.settings.backbone} at {model.settings.input_size} px, {model.flow.steps} steps")
    job = ImportJob(
        model=model,
        checkpoint=checkpoint,
        category=category,
        normal=data,
        top_fraction=settings.model.top_fraction,
        false_alarm_rate=settings.training.false_alarm_rate,
        limits=settings.limits,
        detector=settings.detector,
        registry_root=settings.registry.root,
    )
    with TrainingDisplay([category]) as display:
        for progress in run_import(job):
            display.show(progress)
    assert progress.manifest is not None  # noqa: S101 - the last one carries it
    manifest = progress.manifest
    if progress.note:
        say(progress.note, "yellow")
    if as_json:
        print_json(manifest.model_dump(mode="json", exclude={"calibration"}))
    say(f"{manifest.model} is written; threshold {manifest.calibration.threshold:.4g}")
    if promote:
        Registry(settings.registry.root).promote(category, manifest.version)
        say(f"{manifest.model} is current")
    else:
        root = shlex.quote(settings.registry.root)
        say(f"to serve it: flawstream models promote {category} {manifest.version} --registry {root}")
