"""`flawstream train`: trains a model version for each category of a data set."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream_cli.cluster import Cluster, on_cluster
from flawstream_cli.data_sets import CategoryOption, LayoutOption, RootArgument, exclude_faulty
from flawstream_cli.interruption import ending_in_order
from flawstream_cli.promotions import Promotions
from flawstream_cli.submission import submit_job
from flawstream_cli.terminal import (
    ConfigOption,
    JsonOption,
    RegistryOption,
    print_message,
    read_settings,
)
from flawstream_cli.training_display import TrainingDisplay
from flawstream_cli.training_summary import report_run, shortage_warnings
from schemas.manifest import BackboneSpec, Device, ModelManifest
from schemas.presets import PresetName
from schemas.settings import BackboneArithmetic, Settings
from serving.ray_metrics import RayMetrics
from training.datasets.open import DatasetLayout, open_dataset
from training.datasets.samples import CategoryData
from training.fleet import train_fleet
from training.pipeline import Progress, Stage, TrainingJob
from training.preflight import check_nodes, require_writable
from training.work import Recipe, find_finished

Watch = Callable[[Iterator[Progress], Sequence[str]], Iterator[Progress]]

_DEVICES: dict[str, tuple[Device, ...]] = {
    "cpu": ("cpu",),
    "gpu": ("cuda",),
    "auto": ("cpu", "cuda"),
    "both": ("cpu", "cuda"),
}
"""By `training.device`: trained on which devices a version is what the run would train."""
_MANY_CPUS = 4


def train(
    root: RootArgument,
    category: CategoryOption = None,
    layout: LayoutOption = DatasetLayout.AUTO,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="A named configuration; `flawstream models presets` lists them.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="A timm model, e.g. resnet18.")] = None,
    weights: Annotated[str | None, typer.Option(help="auto, package, timm, or the path of a state dict.")] = None,
    input_size: Annotated[int | None, typer.Option(help="Side in pixels to which images are resized.")] = None,
    arithmetic: Annotated[
        BackboneArithmetic | None, typer.Option(help="Of the backbone; int8 is for CPUs with VNNI or AMX.")
    ] = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Share of normal images that may be called anomalous.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of all random numbers.")] = None,
    check: Annotated[bool, typer.Option(help="Decode every image first. Names and counts are always checked.")] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Train nothing if any category's data has an error.")
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Versions of each category, one per seed from --seed on; the first is promoted.")
    ] = 1,
    promote: Annotated[bool, typer.Option(help="Make the new versions current.")] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Promote a version that is worse than the current one too.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Train too what an earlier run has trained on the same data and recipe.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPUs and threads of a category. Part of the recipe: weights depend on it."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto (GPUs if there are any, else CPUs), cpu, gpu, or both side by side.")
    ] = None,
    gpus_per_category: Annotated[
        float | None, typer.Option(min=0, help="GPUs, or a share of one, that Ray reserves for a category.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0, metavar="GB", help="Memory that Ray reserves for a category.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Train only on nodes with this Ray label; may be repeated."),
    ] = None,
    wait_for_nodes: Annotated[
        bool | None,
        typer.Option("--wait-for-nodes", help="Wait for a node that can train, e.g. of an autoscaler, not refuse."),
    ] = None,
    registry: RegistryOption = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", envvar="RAY_ADDRESS", help="A Ray cluster; by default only this machine."
        ),
    ] = None,
    submit: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Run as a Ray Job on the cluster with this dashboard, http://HOST:8265."),
    ] = None,
    follow: Annotated[bool, typer.Option(help="With --submit: print the job's log until it ends.")] = True,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train every category of a data set, in parallel on Ray.

    Needs normal images only. A share of them is held out, and sets the threshold for the false-alarm rate. If there is
    a test folder, the metrics of `flawstream evaluate` are reported. A category whose data has an error
    (`flawstream datasets check`) is skipped. What an earlier run has trained on the same data by the same recipe is
    skipped. A version with a lower AUROC or more false alarms than the current one is not promoted, except with
    --force.

    Example: `flawstream train data/mvtec -c bottle -c cable --epochs 20`

    Exit code 1: a category failed, has faulty data or was not promoted; the others are trained. 3: nothing was trained.
    5: the cluster was lost. 130, 143: ended by Ctrl-C, by SIGTERM. 5, 130 and 143 come with the summary of what is
    trained and what is not.
    """
    with ending_in_order(as_json=as_json) as ending:
        settings = read_settings(
            config,
            training={
                "epochs": epochs,
                "false_alarm_rate": false_alarm_rate,
                "seed": seed,
                "threads": threads,
                "device": device,
                "num_gpus": gpus_per_category,
                "memory_gb": memory,
                "labels": _labels(label),
                "wait_for_nodes": wait_for_nodes,
            },
            model={
                "preset": preset,
                "backbone": backbone,
                "weights": weights,
                "input_size": input_size,
                "arithmetic": arithmetic,
            },
            registry={"root": registry},
        )
        if submit is not None:
            paths = {"ROOT": root, "--registry": settings.registry.root}
            sys.exit(submit_job(submit, sys.argv[1:], settings, paths, follow=follow, as_json=as_json))
        data = open_dataset(root, category, layout)
        backbone_spec = functools.cache(lambda: Backbone(settings.model).spec)
        finished = {} if again else _find_finished(data, settings, seeds, backbone_spec)
        unfinished = [one for one in data if any((one.name, seed) not in finished for seed in _seeds(settings, seeds))]
        sound, faulty = exclude_faulty(unfinished, settings, decode=check, strict=strict)
        with contextlib.ExitStack() as stack:
            watch = _unwatched
            if sound:
                require_writable(settings.registry.root)
                cluster = stack.enter_context(on_cluster(ray_address))
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # Ray prints deaths of nodes
                watch = functools.partial(ending.watch, head=cluster.head)
                _hint_at_idle_cpus(cluster, len(sound) * seeds, settings)
                for node in check_nodes(sound[0].files()[0], _absolute(settings.registry.root)):
                    print_message(f"warning: {node} has not answered the check; training goes on", "yellow")
            manifests, failures = train_all(
                sound, settings, promote=promote, force=force, seeds=seeds, finished=finished, watch=watch
            )
        failures |= faulty
        report_run(manifests, list(finished.values()), failures, settings.registry.root, as_json=as_json)
    ending.leave(failed=bool(failures))


def _unwatched(training: Iterator[Progress], jobs: Sequence[str]) -> Iterator[Progress]:
    del jobs
    return training


def train_all(
    data: list[CategoryData],
    settings: Settings,
    *,
    promote: bool = True,
    force: bool = False,
    seeds: int = 1,
    finished: Mapping[tuple[str, int], ModelManifest] = MappingProxyType({}),
    watch: Watch = _unwatched,
) -> tuple[list[ModelManifest], dict[str, str]]:
    """Train all categories with progress bars, and warn about those with too few images to calibrate.

    Args:
        data: The categories.
        settings: The recipe, with the first seed.
        promote: Whether to promote the versions with the first seed.
        force: Whether to promote those that are worse than the current ones too.
        seeds: Number of versions per category.
        finished: Versions that are not trained again, by category and seed; promoted too, as the run that trained them
            may have been cut short.
        watch: Wraps the training, with the names of the jobs; see `interruption.Ending.watch`.

    Returns:
        The published versions, sorted by category and seed; and the errors of the failed jobs, by job name.
    """
    jobs = [
        _job(category, settings, seed, seeds)
        for category in data
        for seed in _seeds(settings, seeds)
        if (category.name, seed) not in finished
    ]
    manifests: list[ModelManifest] = []
    failures: dict[str, str] = {}
    promotions = Promotions(settings.registry, force=force)
    if promote:
        promotions.add(manifest for (_, seed), manifest in finished.items() if seed == settings.training.seed)
    with contextlib.closing(promotions), TrainingDisplay([job.name for job in jobs]) as display:
        metrics = RayMetrics(settings.metrics.max_categories)
        training = train_fleet(
            jobs, settings.model, settings.limits, settings.detector, settings.training, metrics=metrics
        )
        for progress in watch(training, [job.name for job in jobs]):
            display.show(progress)
            if progress.manifest is not None:
                manifests.append(progress.manifest)
                if promote and progress.manifest.training.seed == settings.training.seed:
                    promotions.add([progress.manifest])
            elif progress.stage is Stage.FAILED:
                failures[progress.job] = progress.note
    failures |= promotions.refused
    for model, warning in shortage_warnings(manifests).items():
        print_message(f"warning: {model}: {warning}", "yellow")
    return sorted(manifests, key=lambda m: (m.category, m.training.seed)), failures


def _seeds(settings: Settings, count: int) -> range:
    return range(settings.training.seed, settings.training.seed + count)


def _job(data: CategoryData, settings: Settings, seed: int, seeds: int) -> TrainingJob:
    return TrainingJob(
        data,
        settings.model,
        settings.training.model_copy(update={"seed": seed}),
        _absolute(settings.registry.root),
        label=f"seed {seed}" if seeds > 1 else "",
        detector=settings.detector,
    )


def _find_finished(
    data: list[CategoryData], settings: Settings, seeds: int, backbone_spec: Callable[[], BackboneSpec]
) -> dict[tuple[str, int], ModelManifest]:
    """Find what an earlier run has trained; loads the backbone only if the registry has versions to compare with.

    Raises:
        RegistryError: The registry cannot be read.
        ConfigError: The backbone does not exist.
        WeightsError: The backbone's weights cannot be loaded.
    """
    registry = Registry(settings.registry.root)
    trained = set(registry.categories())
    known = [category for category in data if category.name in trained]
    if not known:
        return {}
    spec = backbone_spec()
    recipes = [
        Recipe(spec, settings.model, settings.training.model_copy(update={"seed": seed}), settings.detector, device)
        for seed in _seeds(settings, seeds)
        for device in _DEVICES[settings.training.device]
    ]
    return find_finished(registry, known, recipes)


def _labels(options: list[str] | None) -> dict[str, str] | None:
    """Read `--label KEY=VALUE`.

    Raises:
        typer.BadParameter: An option has another form.
    """
    if not options:
        return None
    pairs = [option.partition("=") for option in options]
    for key, separator, value in pairs:
        if not (key and separator and value):
            raise typer.BadParameter(f"{key + separator + value!r} is no label; one looks like zone=a")
    return {key: value for key, _, value in pairs}


def _hint_at_idle_cpus(cluster: Cluster, categories: int, settings: Settings) -> None:
    """Point out how few categories can use many CPUs, which their weights would show."""
    threads = settings.training.threads
    if not cluster.gpus and cluster.cpus >= _MANY_CPUS * categories * threads:
        print_message(
            f"hint: training uses {categories * threads} of {cluster.cpus:g} CPUs; --threads gives each category more, "
            f"with other weights in the last bits"
        )


def _absolute(root: str) -> str:
    """Make a folder's path absolute, since trainers have other working directories; leave URLs as they are."""
    return root if "://" in root else str(Path(root).absolute())
