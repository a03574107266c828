"""`flawstream evaluate`: measures model versions on labelled test images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from flawstream.calibration import expected_false_alarms, shortage_of
from flawstream.engines.choose import make_engine, quiet_torch
from flawstream.engines.protocol import Engine, arithmetic_of
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from flawstream.registry.versions import open_backbone
from flawstream_cli.data_sets import CategoryOption, LayoutOption, RootArgument, is_writable
from flawstream_cli.terminal import (
    ConfigOption,
    JsonOption,
    RegistryOption,
    err,
    out,
    print_json,
    print_message,
    read_settings,
    table,
)
from schemas.errors import ConfigError, DatasetError, RegistryError, UnknownCategoryError
from schemas.manifest import BackboneSpec, Calibration, DefectMetrics, EvaluationMetrics, ModelManifest
from schemas.settings import LimitSettings, Settings
from training.datasets.open import DatasetLayout, open_dataset
from training.datasets.samples import CategoryData
from training.report.report import JudgedImage, judge, write_report
from training.steps.evaluate import METRIC_NAMES, Evaluation, ImageScorer, Spread, spread

_NOT_RECIPE = {"seed", "final_loss", "duration_s"}
"""Fields of the training record that may differ between versions of the same recipe."""


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """Evaluation of one version on its category's test images."""

    manifest: ModelManifest
    calibration: Calibration
    metrics: EvaluationMetrics
    judged: list[JudgedImage]


def evaluate(
    root: RootArgument,
    category: CategoryOption = None,
    layout: LayoutOption = DatasetLayout.AUTO,
    versions: Annotated[
        int,
        typer.Option(min=1, help="Number of versions: the current one and the newest that differ only in the seed."),
    ] = 1,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report with curves and maps to this file.")] = None,
    images: Annotated[
        bool, typer.Option("--images", help="With --json: also print each image's score and verdict.")
    ] = False,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the current model versions on labelled test images, with the engine that serves (`detector.engine`).

    Image AUROC, average precision and F1-max; pixel AUROC and AUPRO if there are masks; false alarms and recall at the
    deployed threshold. Each with its 95 % interval.

    Example: `flawstream evaluate data/mvtec -c bottle --report report.html`
    """
    if images and not as_json:
        raise typer.BadParameter("--images needs --json")
    settings = read_settings(config, registry={"root": registry})
    _require_writable(report)
    data = [each for each in open_dataset(root, category, layout) if each.test]
    if not data:
        raise DatasetError(f"no category below {root} has images in test/; evaluation needs labelled test images")
    opened = Registry(settings.registry.root)
    currents = _current_manifests(opened, [each.name for each in data], settings.registry.root)
    chosen = {name: _same_recipe(current, opened, versions) for name, current in currents.items()}
    evaluated: dict[str, list[_Evaluated]] = {}
    engines: dict[BackboneSpec, Engine] = {}
    for each in data:
        spec = currents[each.name].backbone
        if spec not in engines:
            print_message(f"loading {spec.name} ...")
            engines[spec] = _open_engine(opened, currents[each.name], settings)
        evaluated[each.name] = [
            _evaluate_version(each, manifest, engines[spec], opened, settings.limits) for manifest in chosen[each.name]
        ]
    if report is not None:
        _write_report(report, evaluated)
        print_message(f"report: {report}")
    if as_json:
        print_json({name: _as_json(runs, with_images=images) for name, runs in evaluated.items()})
        return
    out.print(_metrics_table(evaluated))
    if any(len(runs[0].metrics.defects) > 1 for runs in evaluated.values()):
        out.print(_defects_table(evaluated))
    for runs in evaluated.values():
        if warning := shortage_of(runs[0].calibration):
            print_message(f"warning: {runs[0].manifest.model}: {warning}", "yellow")


def _require_writable(report: Path | None) -> None:
    if report is not None and (report.is_dir() or not is_writable(report)):
        raise ConfigError(f"the report {report} cannot be written here; name a file in a folder that you may write")


def _current_manifests(registry: Registry, categories: list[str], root: str) -> dict[str, ModelManifest]:
    currents = registry.currents()
    missing = [name for name in categories if name not in currents]
    if missing:
        raise UnknownCategoryError(
            f"no current version in {root} of {', '.join(missing)}; "
            "train them with `flawstream train`, or choose other categories with --category"
        )
    return {name: registry.manifest(name, currents[name]) for name in categories}


def _same_recipe(current: ModelManifest, registry: Registry, count: int) -> list[ModelManifest]:
    """Find versions with the data, model and recipe of the current one, one per seed; the current one comes first."""
    runs: dict[int | None, ModelManifest] = {current.training.seed: current}  # an imported version has no seed
    for version in reversed(registry.versions(current.category)) if count > 1 else ():
        if len(runs) == count:
            break
        manifest = registry.manifest(current.category, version)
        if _recipe(manifest) == _recipe(current):
            runs.setdefault(manifest.training.seed, manifest)
    if len(runs) < count:
        raise RegistryError(
            f"{current.model}: --versions asks for {count} versions of its data, model and recipe, and the registry "
            f"has {len(runs)} with different seeds; train more with `flawstream train --seeds {count}`"
        )
    return list(runs.values())


def _recipe(manifest: ModelManifest) -> tuple[object, ...]:
    calibration = manifest.calibration
    recipe = manifest.training.model_dump(exclude=_NOT_RECIPE)
    return manifest.backbone, manifest.flow, recipe, calibration.false_alarm_rate, calibration.top_fraction


def _open_engine(registry: Registry, manifest: ModelManifest, settings: Settings) -> Engine:
    """Start the engine that serves, so that the metrics are those of the results on the stream."""
    engine = make_engine(settings.detector, lambda: open_backbone(registry, manifest, settings.model))
    if engine.spec.identity != manifest.backbone.identity:  # only with Triton, whose server has its own backbone
        raise ConfigError(
            f"{manifest.model} needs the backbone {manifest.backbone.summary}, and the Triton server at "
            f"{settings.detector.triton_url} has {engine.spec.summary}; evaluate with another detector.engine, or "
            "export the version to another Triton server"
        )
    quiet_torch(engine)
    return engine


def _evaluate_version(
    data: CategoryData, manifest: ModelManifest, engine: Engine, registry: Registry, limits: LimitSettings
) -> _Evaluated:
    calibration = manifest.calibration_in(arithmetic_of(engine, manifest))
    weights = registry.read_file(manifest, WEIGHTS_FILE)
    head = FastFlowHead.from_bytes(weights, manifest.backbone, manifest.flow)
    loaded = engine.load(head, manifest, partial(registry.read_file, manifest))
    paths = [sample.path for sample in data.test]
    evaluation = Evaluation()
    judged: list[JudgedImage] = []
    scored = track(
        ImageScorer(engine, [loaded], limits, calibration.top_fraction, manifest.bit_depth).score(paths),
        description=manifest.model,
        total=len(paths),
        console=err,
        disable=not err.is_terminal,
    )
    for sample, (image,) in zip(data.test, scored, strict=True):
        evaluation.add(sample, image)
        judged.append(judge(data.name, sample, image, calibration.threshold))
    return _Evaluated(manifest, calibration, evaluation.metrics(calibration.threshold), judged)


def _write_report(path: Path, evaluated: Mapping[str, Sequence[_Evaluated]]) -> None:
    write_report(
        path,
        "flawstream: evaluation",
        [image for runs in evaluated.values() for image in runs[0].judged],
        {name: runs[0].metrics for name, runs in evaluated.items()},
        {name: {run.manifest.model: run.metrics for run in runs} for name, runs in evaluated.items()},
    )


def _as_json(runs: Sequence[_Evaluated], *, with_images: bool) -> dict[str, Any]:
    """Return one version's dictionary; of several versions a list, with mean and standard deviation of each metric."""
    versions = [_run_as_json(run, with_images=with_images) for run in runs]
    if len(runs) == 1:
        return versions[0]
    spreads = spread([run.metrics for run in runs])
    return {
        "versions": versions,
        "mean": {name: each.mean for name, each in spreads.items()},
        "std": {name: each.deviation for name, each in spreads.items()},
    }


def _run_as_json(run: _Evaluated, *, with_images: bool) -> dict[str, Any]:
    calibration = run.calibration
    version = {
        "model": run.manifest.model,
        "arithmetic": calibration.arithmetic,
        "seed": run.manifest.training.seed,
        "threshold": calibration.threshold,
        "asked_false_alarm_rate": calibration.false_alarm_rate,
        "calibration_images": len(calibration.scores),
        "expected_false_alarm_rate": expected_false_alarms(calibration),
        "warning": shortage_of(calibration),
        **run.metrics.model_dump(),
    }
    if with_images:
        version["images"] = [
            {
                "path": str(image.path),
                "label": image.defect,
                "anomalous": image.anomalous,
                "score": image.score,
                "verdict": "anomalous" if image.is_alarm else "normal",
            }
            for image in run.judged
        ]
    return version


def _metrics_table(evaluated: Mapping[str, Sequence[_Evaluated]]) -> Table:
    """Build a row per version with the interval below each value; after several, a row of mean and deviation."""
    rows: list[tuple[object, ...]] = []
    for name, runs in evaluated.items():
        rows += [
            (
                f"{name}\n{run.manifest.version}",
                f"{run.metrics.normal_images}\n{run.metrics.anomalous_images}",
                *(_with_interval(run.metrics, metric) for metric in METRIC_NAMES),
            )
            for run in runs
        ]
        if spreads := spread([run.metrics for run in runs]):
            deviations = (_mean_and_deviation(spreads.get(metric)) for metric in METRIC_NAMES)
            rows.append((f"mean of {len(runs)}\nstd", "", *deviations))
    columns = ("category\nversion", "normal\ndefective", *(f"{label}\n95 %" for label in METRIC_NAMES.values()))
    return table("Evaluation", columns, rows)


def _defects_table(evaluated: Mapping[str, Sequence[_Evaluated]]) -> Table:
    rows = [
        (name, kind.defect, kind.images, _with_interval(kind, "recall"), _with_interval(kind, "image_auroc"))
        for name, runs in evaluated.items()
        for kind in runs[0].metrics.defects
    ]
    columns = ("category", "defect", "images", "recall\n95 %", "AUROC\n95 %")
    return table("By kind of defect", columns, rows)


def _with_interval(metrics: EvaluationMetrics | DefectMetrics, name: str) -> str | None:
    value = getattr(metrics, name)
    if value is None:
        return None
    low, high = metrics.intervals.get(name, (None, None))
    return f"{value:.3f}" if low is None else f"{value:.3f}\n{low:.2f}-{high:.2f}"


def _mean_and_deviation(metric: Spread | None) -> str | None:
    return None if metric is None else f"{metric.mean:.3f}\n{metric.deviation:.3f}"
