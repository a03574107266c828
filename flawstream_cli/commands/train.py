"""`flawstream train`: folders of normal images become model versions."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flawstream.calibration import shortage_of
from flawstream.cluster import Cluster
from flawstream.fastflow.backbone import Backbone
from flawstream.registry.backbones import require_one_backbone
from flawstream.registry.registry import Registry
from flawstream.telemetry.ray_metrics import RayMetrics
from flawstream_cli.data_sets import CategoryOption, LayoutOption, exclude_faulty
from flawstream_cli.on_cluster import on_cluster
from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    RegistryOption,
    out,
    print_json,
    read_settings,
    say,
    table,
)
from flawstream_cli.training_display import TrainingDisplay
from schemas.errors import RegistryError
from schemas.manifest import ModelManifest
from schemas.presets import PresetName
from schemas.settings import Settings
from training.datasets.open import DatasetLayout, open_dataset
from training.datasets.samples import CategoryData
from training.fleet import train_fleet
from training.pipeline import Stage, TrainingJob


def train(
    root: Annotated[
        Path, typer.Argument(help="Data set: ROOT/CATEGORY/train/good, test/DEFECT, ground_truth; or another --layout.")
    ],
    category: CategoryOption = None,
    layout: LayoutOption = DatasetLayout.AUTO,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="A configuration by name: flawstream models presets.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="A timm model, e.g. resnet18.")] = None,
    weights: Annotated[str | None, typer.Option(help="auto, package, timm, or a state dict's path.")] = None,
    input_size: Annotated[int | None, typer.Option(help="Side in pixels that images are resized to.")] = None,
    false_alarm_rate: Annotated[float | None, typer.Option(help="Share of normal parts that may be rejected.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random.")] = None,
    check: Annotated[
        bool, typer.Option(help="Decode every image first. Names and counts are checked in any case.")
    ] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Train nothing where any category's data has an error.")
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Versions of each category, with this and the following seeds; the first serves.")
    ] = 1,
    promote: Annotated[bool, typer.Option(help="Make the new versions current.")] = True,
    registry: RegistryOption = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster; without it, this machine alone.")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train every category of a data set, in parallel on Ray.

    Normal images only are needed. A share of them never trains the model: it sets the threshold for the false-alarm
    rate asked for. Where there is a test folder, the metrics of `flawstream evaluate` on it are reported. A category
    in which `flawstream datasets check` finds an error is not trained; the others are. A backbone that is not that of
    the current versions of other categories is refused, unless nothing is promoted.

    Example: `flawstream train data/mvtec -c bottle -c cable --epochs 20`

    Exit code 1: a category failed, has faulty data or was not promoted; the others are trained. 3: nothing could be
    trained.
    """
    settings = read_settings(
        config,
        training={"epochs": epochs, "false_alarm_rate": false_alarm_rate, "seed": seed},
        model={"preset": preset, "backbone": backbone, "weights": weights, "input_size": input_size},
        registry={"root": registry},
    )
    data = open_dataset(root, category, layout)
    sound, faulty = exclude_faulty(data, settings, decode=check, strict=strict)
    if promote:
        _refuse_other_backbone(sound, settings)
    with on_cluster(ray_address) as joined:
        manifests, failures = train_all(sound, settings, joined, promote=promote, seeds=seeds)
    failures |= faulty
    if as_json:
        trained = [m.model_dump(mode="json", exclude={"calibration"}) for m in manifests]
        print_json({"trained": trained, "failed": failures, "warnings": _warnings(manifests)})
    elif manifests:
        out.print(training_table(manifests))
        say(f"registry: {settings.registry.root}")
        say(f"next:     flawstream serve --registry {settings.registry.root}")
    for name, reason in failures.items():
        say(f"{name} failed: {reason}", "red")
    if failures:
        raise typer.Exit(ExitCode.FAILED)


def train_all(
    data: list[CategoryData], settings: Settings, joined: Cluster, *, promote: bool = True, seeds: int = 1
) -> tuple[list[ModelManifest], dict[str, str]]:
    """Train all categories, with a bar for each version, and say where there were too few images to calibrate.

    Args:
        data: One item a category.
        settings: The recipe, its seed the first.
        joined: Where to train.
        promote: Whether the first seed's versions become current.
        seeds: Versions of each category.

    Returns:
        The published versions by category and seed, and what was wrong with the jobs that failed, by name.
    """
    jobs = [_job(one, settings, number, seeds) for one in data for number in range(seeds)]
    manifests: list[ModelManifest] = []
    failures: dict[str, str] = {}
    promotions = _Promotions(Registry(settings.registry.root))
    with TrainingDisplay([job.name for job in jobs]) as display:
        metrics = RayMetrics(settings.metrics.max_categories)
        for progress in train_fleet(
            jobs,
            settings.model,
            settings.limits,
            settings.detector,
            joined,
            num_gpus=settings.training.num_gpus,
            metrics=metrics,
        ):
            display.show(progress)
            if progress.manifest is not None:
                manifests.append(progress.manifest)
                if promote and progress.manifest.training.seed == settings.training.seed:
                    promotions.add(progress.manifest)
            elif progress.stage is Stage.FAILED:
                failures[progress.job] = progress.note
    failures |= promotions.refused
    for model, missing in _warnings(manifests).items():
        say(f"warning: {model}: {missing}", "yellow")
    return sorted(manifests, key=lambda m: (m.category, m.training.seed)), failures


class _Promotions:
    """Promotes versions as they are trained; where a run changes the backbone, together once the last one is there.

    Args:
        registry: Where the versions are.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._waiting: dict[str, str] = {}
        self._why = ""

    @property
    def refused(self) -> dict[str, str]:
        """Give for every category that was not promoted the reason."""
        return {
            category: f"{category}@{version} is written and not promoted: {self._why}"
            for category, version in self._waiting.items()
        }

    def add(self, manifest: ModelManifest) -> None:
        """Promote a version and those that waited for it, or keep it waiting where that is refused."""
        self._waiting[manifest.category] = manifest.version
        try:
            self._registry.promote_all(self._waiting)
        except RegistryError as error:
            self._why = str(error)
        else:
            self._waiting.clear()


def _refuse_other_backbone(data: list[CategoryData], settings: Settings) -> None:
    """Refuse before training what could not be promoted after it.

    Raises:
        MixedBackbonesError: Current versions of categories that are not trained now run on another backbone.
        RegistryError: The registry cannot be read.
        ConfigError: The backbone does not exist.
        WeightsError: The backbone's weights cannot be had.
    """
    trained, root = [one.name for one in data], settings.registry.root
    current, _ = Registry(root).current_manifests()
    others = {one.category: one.backbone for one in current if one.category not in trained}
    if others:
        require_one_backbone(
            others | dict.fromkeys(trained, Backbone(settings.model).spec),
            f"the training is refused, as the current versions in {root} would run on several backbones",
            "train on the backbone of the others, train all categories in one run, use a registry of its own "
            "(--registry), or train with --no-promote",
        )


def _job(data: CategoryData, settings: Settings, number: int, seeds: int) -> TrainingJob:
    seed = settings.training.seed + number
    return TrainingJob(
        data,
        settings.model,
        settings.training.model_copy(update={"seed": seed}),
        _absolute(settings.registry.root),
        label=f"seed {seed}" if seeds > 1 else "",
    )


def training_table(manifests: list[ModelManifest]) -> Table:
    """Show trained versions."""
    return table(
        "Trained",
        (
            "category",
            "version",
            "seed",
            "train",
            "calibrate",
            "test",
            "AUROC",
            "pixel AUROC",
            "AUPRO",
            "false alarms",
            "recall",
            "seconds",
        ),
        (
            (
                m.category,
                m.version,
                m.training.seed,
                m.training.train_images,
                m.training.calibration_images,
                found.normal_images + found.anomalous_images,
                found.image_auroc,
                found.pixel_auroc,
                found.aupro,
                found.false_alarm_rate,
                found.recall,
                round(m.training.duration_s),
            )
            for m in manifests
            for found in [m.serving_metrics]
        ),
    )


def _warnings(manifests: list[ModelManifest]) -> dict[str, str]:
    """Say for which models the false-alarm rate could not be kept."""
    return {m.model: missing for m in manifests if (missing := shortage_of(m.calibration))}


def _absolute(root: str) -> str:
    """Make a folder mean the same in every process; URLs stay as they are."""
    return root if "://" in root else str(Path(root).absolute())
