"""`flawstream evaluate`: how well the current versions do on a test folder."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from flawstream.fastflow.backbone import load_trained_backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.maps import bounded, encode_map
from flawstream.registry import WEIGHTS_FILE, Registry
from flawstream_cli.data_sets import LayoutOption
from flawstream_cli.terminal import (
    ConfigOption,
    JsonOption,
    RegistryOption,
    err,
    out,
    print_json,
    read_settings,
    say,
    table,
)
from schemas.errors import DatasetError, UnknownCategoryError
from schemas.manifest import BackboneSpec, Metrics, ModelManifest
from schemas.messages import MapCodec
from training.datasets.open import Layout, open_dataset
from training.datasets.samples import CategoryData
from training.evaluate import Evaluation, ImageScorer, ScoredImage
from training.features import FeatureExtractor
from training.report import JudgedImage, write_report


def evaluate(
    root: Annotated[Path, typer.Argument(help="Data set: ROOT/CATEGORY/test/good and test/DEFECT.")],
    category: Annotated[
        list[str] | None, typer.Option("--category", "-c", help="Only this category; may be given again.")
    ] = None,
    layout: LayoutOption = Layout.AUTO,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report with images and maps here.")] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the current model versions on labelled test images.

    Example: `flawstream evaluate data/mvtec -c bottle --report report.html`
    """
    settings = read_settings(config, registry={"root": registry})
    data = [one for one in open_dataset(root, category, layout) if one.test]
    if not data:
        raise DatasetError(f"no category below {root} has images in test/; evaluation needs labelled test images")
    opened = Registry(settings.registry.root)
    manifests = _current_manifests(opened, [one.name for one in data], settings.registry.root)
    metrics: dict[str, Metrics] = {}
    judged: list[JudgedImage] = []
    extractors: dict[BackboneSpec, FeatureExtractor] = {}
    for one in data:
        spec = manifests[one.name].backbone
        if spec not in extractors:
            say(f"loading {spec.name} ...")
            extractors[spec] = FeatureExtractor(load_trained_backbone(spec, settings.model), settings.limits)
        metrics[one.name], images = _evaluate_category(one, manifests[one.name], extractors[spec], opened)
        judged += images
    versions = {name: manifest.model for name, manifest in manifests.items()}
    if report is not None:
        write_report(report, "flawstream: evaluation", judged, metrics)
        say(f"report: {report}")
    if as_json:
        print_json({name: {"model": versions[name], **found.model_dump()} for name, found in metrics.items()})
        return
    out.print(
        table(
            "Evaluation",
            ("category", "model", "normal", "defective", "AUROC", "pixel AUROC", "false alarms", "recall"),
            (
                (
                    name,
                    versions[name],
                    m.normal_images,
                    m.anomalous_images,
                    m.image_auroc,
                    m.pixel_auroc,
                    m.false_alarm_rate,
                    m.recall,
                )
                for name, m in metrics.items()
            ),
        )
    )


def _current_manifests(registry: Registry, categories: list[str], root: str) -> dict[str, ModelManifest]:
    currents = registry.currents()
    missing = [name for name in categories if name not in currents]
    if missing:
        raise UnknownCategoryError(
            f"no current version in {root} of {', '.join(missing)}; "
            "train with `flawstream train`, or choose others with --category"
        )
    return {name: registry.manifest(name, currents[name]) for name in categories}


def _evaluate_category(
    data: CategoryData, manifest: ModelManifest, extractor: FeatureExtractor, registry: Registry
) -> tuple[Metrics, list[JudgedImage]]:
    calibration = manifest.calibration
    weights = registry.read_file(manifest, WEIGHTS_FILE)
    head = FastFlowHead.from_bytes(weights, manifest.backbone, manifest.flow)
    paths = [sample.path for sample in data.test]
    evaluation = Evaluation()
    judged: list[JudgedImage] = []
    scored = track(
        ImageScorer(extractor, head, calibration.top_fraction).score(paths),
        description=data.name,
        total=len(paths),
        console=err,
        disable=not err.is_terminal,
    )
    for sample, image in zip(data.test, scored, strict=True):
        evaluation.add(sample, image)
        judged.append(
            _judge(data.name, sample.defect, image, anomalous=sample.anomalous, threshold=calibration.threshold)
        )
    return evaluation.metrics(calibration.threshold), judged


def _judge(category: str, defect: str, image: ScoredImage, *, anomalous: bool, threshold: float) -> JudgedImage:
    half = [bounded(grid).astype(np.float16) for grid in image.grids]
    return JudgedImage(
        path=image.path,
        category=category,
        defect=defect,
        anomalous=anomalous,
        score=image.score,
        threshold=threshold,
        map=encode_map(half, (image.side, image.side), MapCodec.GRID_F16, threshold),
    )
