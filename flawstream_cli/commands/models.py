"""`flawstream models`: lists, promotes, exports and imports model versions."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flawstream.registry.registry import REPORT_FILE, Registry
from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    RegistryOption,
    busy,
    out,
    print_json,
    print_message,
    read_settings,
    table,
)
from schemas.errors import RegistryError, UnknownCategoryError
from schemas.manifest import ModelManifest
from schemas.settings import Resize

if TYPE_CHECKING:
    from training.imports import ImportJob

app = typer.Typer(help="List, promote, export and import model versions.", no_args_is_help=True)


@app.command("list")
def list_(
    category: Annotated[str | None, typer.Argument(help="Only versions of this category.")] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List versions; a star marks the current one of each category.

    Example: `flawstream models list bottle`

    Exit code 1: a version is damaged; the others are listed.
    """
    settings = read_settings(config, registry={"root": registry})
    opened = Registry(settings.registry.root)
    currents = opened.currents()
    categories = [category] if category else opened.categories()
    manifests: list[ModelManifest] = []
    damaged: list[RegistryError] = []
    for name, version in ((each, version) for each in categories for version in opened.versions(each)):
        try:
            manifests.append(opened.manifest(name, version))
        except RegistryError as error:
            damaged.append(error)
    _show(manifests, currents, settings.registry.root, as_json=as_json)
    for damage in damaged:
        print_message(str(damage), "red")
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
        print_message(f"no versions in {root}; train some with `flawstream train`")
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
    version: Annotated[str | None, typer.Argument(help="The version; by default the current one.")] = None,
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


@app.command()
def report(
    category: Annotated[str, typer.Argument(help="The category.")],
    version: Annotated[str | None, typer.Argument(help="The version; by default the current one.")] = None,
    to: Annotated[Path | None, typer.Option(help="The file; by default CATEGORY-VERSION.html here.")] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Write the page about a version's training: loss, scores of held-out normal images, their maps, test images.

    The normal images with the highest scores come first: they may show defects that nobody saw.

    Example: `flawstream models report bottle --to bottle.html`
    """
    settings = read_settings(config, registry={"root": registry})
    opened = Registry(settings.registry.root)
    manifest = opened.manifest(category, version or _current(opened, category, settings.registry.root))
    if REPORT_FILE not in manifest.files:
        raise RegistryError(
            f"{manifest.model} has no report: it was imported, or trained by an older release; "
            "`flawstream evaluate --report` makes one from test images"
        )
    target = to or Path(f"{manifest.category}-{manifest.version}.html")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(opened.read_file(manifest, REPORT_FILE))
    out.print(str(target), highlight=False, soft_wrap=True)


def _current(registry: Registry, category: str, root: str) -> str:
    version = registry.current(category)
    if version is None:
        raise UnknownCategoryError(
            f"category {category!r} has no current version in {root}; `flawstream models list` shows all versions"
        )
    return version


@app.command()
def promote(
    category: Annotated[str, typer.Argument(help="The category.")],
    version: Annotated[str, typer.Argument(help="The version to serve; to roll back, an older one.")],
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a version current. A running service loads it within seconds, and opens its backbone if that is another.

    Example: `flawstream models promote bottle 20261123-134500-1a2b3c4d`
    """
    settings = read_settings(config, registry={"root": registry})
    Registry(settings.registry.root).promote(category, version)
    print_message(f"{category}@{version} is current")


@app.command()
def presets(as_json: JsonOption = False) -> None:
    """List the presets, the named model configurations of `flawstream train --preset`, with their sizes.

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
        str, typer.Argument(metavar="CATEGORY[@VERSION]", help="The version; by default the current one.")
    ],
    kind: Annotated[Literal["onnx", "openvino", "triton"], typer.Option("--format", help="Export format.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Target folder; for triton the model repository.")],
    score: Annotated[bool, typer.Option(help="Add the image score to the outputs.")] = True,
    map_: Annotated[bool, typer.Option("--map/--no-map", help="Add the full-size anomaly map to the outputs.")] = False,
    backend: Annotated[
        Literal["onnxruntime", "python"],
        typer.Option(help="triton: backend of the networks; python for a server without the onnxruntime backend."),
    ] = "onnxruntime",
    max_batch: Annotated[int, typer.Option(min=1, help="triton: largest batch.")] = 32,
    instances: Annotated[int, typer.Option(min=1, help="triton: instances of each network.")] = 1,
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Export a version to another format: uint8 images in, anomaly grids out, preprocessing included.

    Example: `flawstream models export bottle --format onnx --to exported`
    """
    from flawstream.export.triton import TritonOptions  # noqa: PLC0415 - torch takes seconds; `list` needs none
    from flawstream.export.version import ExportFormat, ExportOptions, export_version  # noqa: PLC0415 - the same

    settings = read_settings(config, registry={"root": registry})
    opened = Registry(settings.registry.root)
    category, _, given_version = version.partition("@")
    manifest = opened.manifest(category, given_version or _current(opened, category, settings.registry.root))
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
    category: Annotated[str, typer.Option("--category", "-c", help="Category of the new version.")],
    data: Annotated[
        Path, typer.Option(help="Folder of normal images that did not train the model; they set the threshold.")
    ],
    backbone: Annotated[
        str, typer.Option(help="auto: inferred from the tensors; or one of anomalib's backbones, named as in timm.")
    ] = "auto",
    resize: Annotated[
        Resize, typer.Option(help="antialias: resize images as anomalib does; area: as for models trained here.")
    ] = "antialias",
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Share of normal images that may be called anomalous.")
    ] = None,
    promote: Annotated[bool, typer.Option(help="Make the new version current.")] = False,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import a FastFlow model that anomalib trained, as a new version.

    Reads tensors only and never executes a pickle. Imports the backbone's weights, and infers everything else from the
    tensors. The images in `--data` calibrate the version; with images that trained the model, the threshold would be
    too low. Promote the version to serve it.

    Example: `flawstream models import-anomalib model.ckpt -c bottle --data bottle/held-out`
    """
    from flawstream.fastflow.anomalib import read_anomalib  # noqa: PLC0415 - torch takes seconds; `list` needs none
    from training.imports import ImportJob  # noqa: PLC0415 - the same

    settings = read_settings(config, registry={"root": registry}, training={"false_alarm_rate": false_alarm_rate})
    with busy(f"reading {checkpoint}"):
        model = read_anomalib(checkpoint, backbone, resize)
    print_message(f"found: {model.settings.backbone} at {model.settings.input_size} px, {model.flow.steps} steps")
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
    manifest = _run_import(job)
    if as_json:
        print_json(manifest.model_dump(mode="json", exclude={"calibration"}))
    print_message(f"{manifest.model} is written; threshold {manifest.calibration.threshold:.4g}")
    if promote:
        Registry(settings.registry.root).promote(category, manifest.version)
        print_message(f"{manifest.model} is current")
    else:
        root = shlex.quote(settings.registry.root)
        print_message(f"to serve it: flawstream models promote {category} {manifest.version} --registry {root}")


def _run_import(job: "ImportJob") -> ModelManifest:
    from flawstream_cli.training_display import TrainingDisplay  # noqa: PLC0415 - torch takes seconds; `list` needs none
    from training.imports import run_import  # noqa: PLC0415 - the same

    with TrainingDisplay([job.category]) as display:
        for progress in run_import(job):
            display.show(progress)
    assert progress.manifest is not None  # noqa: S101 - the last report has it
    if progress.note:
        print_message(progress.note, "yellow")
    return progress.manifest
