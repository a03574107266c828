"""`flawstream datasets`: list and check data sets, and write two public ones as folders."""

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from flawstream_cli.data_sets import (
    CategoryOption,
    LayoutOption,
    RootArgument,
    check_folders,
    check_registry,
    count_severities,
    find_faults,
    in_order,
    show_findings,
)
from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    err,
    out,
    print_json,
    print_message,
    read_settings,
    table,
)
from schemas.errors import ConfigError
from training.datasets.check import Finding
from training.datasets.cifar10 import export_cifar10
from training.datasets.elpv import export_elpv
from training.datasets.open import DatasetLayout, open_dataset
from training.datasets.samples import CategoryData

app = typer.Typer(
    help="Check data sets, list what they hold, and write public ones as folders.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


class Exportable(StrEnum):
    """Public data sets that are not published as folders of images."""

    CIFAR10 = "cifar10"
    ELPV = "elpv"


@app.command()
def check(
    root: RootArgument,
    layout: LayoutOption = DatasetLayout.AUTO,
    category: CategoryOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decode every image and list all errors and warnings.

    `flawstream train` runs the same check: it skips categories with errors, and trains those with warnings only.

    Example: `flawstream datasets check data/mvtec -c bottle`

    Exit code 1: there are errors.
    """
    settings = read_settings(config)
    data = open_dataset(root, category, layout)
    beside = check_folders(root, data) if category is None else []
    findings = in_order(check_registry(settings) + beside + find_faults(data, settings))
    errors, warnings = count_severities(findings)
    if as_json:
        print_json({"errors": errors, "warnings": warnings, "findings": [_as_dict(finding) for finding in findings]})
    else:
        show_findings(findings, out)
    print_message(f"categories: {len(data)}, errors: {errors}, warnings: {warnings}")
    if errors:
        raise typer.Exit(ExitCode.FAILED)
    if not as_json:
        layout_option = "" if layout is DatasetLayout.AUTO else f" --layout {layout}"
        print_message(f"next: flawstream train {root}{layout_option}")


@app.command("list")
def list_(
    root: RootArgument,
    layout: LayoutOption = DatasetLayout.AUTO,
    category: CategoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the categories and their numbers of images, without decoding any.

    Example: `flawstream datasets list data/mvtec`
    """
    data = open_dataset(root, category, layout)
    if as_json:
        print_json([_counts(each) for each in data])
        return
    columns = ("category", "train (normal)", "test normal", "test defective", "masks", "defects")
    rows = (
        (
            counts["category"],
            counts["train"],
            counts["test_normal"],
            counts["test_defective"],
            counts["masks"],
            ", ".join(f"{name} {count}" for name, count in _defects(each).items()) or None,
        )
        for each, counts in ((each, _counts(each)) for each in data)
    )
    out.print(table(root, columns, rows))


@app.command()
def export(
    name: Annotated[Exportable, typer.Argument(help="Name of the data set.")],
    target: Annotated[Path, typer.Argument(help="The folder to create.")],
    source: Annotated[
        Path | None, typer.Option(help="For cifar10: the folder of the binary version, cifar-10-batches-bin.")
    ] = None,
) -> None:
    """Write a public data set as folders of images. The folder appears only when it is complete.

    `elpv`: solar cells from the package elpv-dataset. `cifar10`: ten one-class problems of 15,000 images each, from
    the binary version that you have downloaded and extracted.

    Example: `flawstream datasets export cifar10 data/cifar10 --source cifar-10-batches-bin`
    """
    match name:
        case Exportable.ELPV:
            export_elpv(target)
        case Exportable.CIFAR10:
            if source is None:
                raise ConfigError("--source is missing: name the folder of CIFAR-10's binary version")
            with Progress(console=err, transient=True, disable=not err.is_terminal) as bars:
                bar = bars.add_task("writing images")
                export_cifar10(source, target, lambda done, total: bars.update(bar, completed=done, total=total))
    print_message(f"next: flawstream datasets list {target}")


def _as_dict(finding: Finding) -> dict[str, object]:
    return {
        "severity": finding.severity,
        "category": finding.category,
        "problem": finding.problem,
        "path": finding.path,
        "text": finding.text,
        "count": finding.count,
    }


def _counts(data: CategoryData) -> dict[str, object]:
    defective = sum(_defects(data).values())
    return {
        "category": data.name,
        "train": len(data.train),
        "test_normal": len(data.test) - defective,
        "test_defective": defective,
        "masks": len(data.masks()),
        "defects": _defects(data),
    }


def _defects(data: CategoryData) -> dict[str, int]:
    return dict(Counter(sample.defect for sample in data.test if sample.anomalous))
