"""`flawstream datasets`: what a data set holds, what is wrong with it, and two public ones written as folders."""

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from flawstream_cli.data_sets import (
    CategoryOption,
    LayoutOption,
    count_severities,
    find_faults,
    show_findings,
)
from flawstream_cli.terminal import ConfigOption, ExitCode, JsonOption, err, out, print_json, read_settings, say, table
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

RootArgument = Annotated[Path, typer.Argument(help="The data set's folder, or its CSV file.")]


class Exportable(StrEnum):
    """Public data sets that come in another form than folders of images."""

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
    """Decode every image and say all that is wrong, before any time is spent on training.

    A category with errors is not trained by `flawstream train`; warnings it reports and goes past.

    Example: `flawstream datasets check data/mvtec -c bottle`

    Exit code 1: there are errors.
    """
    settings = read_settings(config)
    data = open_dataset(root, category, layout)
    findings = find_faults(data, settings)
    errors, warnings = count_severities(findings)
    if as_json:
        print_json({"errors": errors, "warnings": warnings, "findings": [_as_dict(found) for found in findings]})
    else:
        show_findings(findings, out)
    say(f"categories: {len(data)}, errors: {errors}, warnings: {warnings}")
    if errors:
        raise typer.Exit(ExitCode.FAILED)
    if not as_json:
        named = "" if layout is DatasetLayout.AUTO else f" --layout {layout}"
        say(f"next: flawstream train {root}{named}")


@app.command("list")
def list_(
    root: RootArgument,
    layout: LayoutOption = DatasetLayout.AUTO,
    category: CategoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the categories with how many images each has; opens no image.

    Example: `flawstream datasets list data/mvtec`
    """
    data = open_dataset(root, category, layout)
    if as_json:
        print_json([_counts(one) for one in data])
        return
    columns = ("category", "train (normal)", "test normal", "test defective", "masks", "defects")
    rows = (
        (
            counts["category"],
            counts["train"],
            counts["test_normal"],
            counts["test_defective"],
            counts["masks"],
            ", ".join(f"{name} {count}" for name, count in _defects(one).items()) or None,
        )
        for one, counts in ((one, _counts(one)) for one in data)
    )
    out.print(table(str(root), columns, rows))


@app.command()
def export(
    name: Annotated[Exportable, typer.Argument(help="Which data set.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    source: Annotated[
        Path | None, typer.Option(help="For cifar10: the folder of the binary version, cifar-10-batches-bin.")
    ] = None,
) -> None:
    """Write a public data set as folders of images, once: whole or not at all.

    `elpv`: solar cells out of the package elpv-dataset. `cifar10`: ten one-class problems of 15,000 images each, from
    the binary version, downloaded and extracted.

    Example: `flawstream datasets export cifar10 data/cifar10 --source cifar-10-batches-bin`
    """
    match name:
        case Exportable.ELPV:
            export_elpv(target)
        case Exportable.CIFAR10:
            if source is None:
                raise ConfigError("--source is missing: cifar10 is read from the folder of its binary version")
            with Progress(console=err, transient=True, disable=not err.is_terminal) as bars:
                bar = bars.add_task("writing images")
                export_cifar10(source, target, lambda done, total: bars.update(bar, completed=done, total=total))
    say(f"next: flawstream datasets list {target}")


def _as_dict(found: Finding) -> dict[str, object]:
    return {
        "severity": found.severity,
        "category": found.category,
        "problem": found.problem,
        "path": found.path,
        "text": found.text,
    }


def _counts(data: CategoryData) -> dict[str, object]:
    defective = sum(_defects(data).values())
    return {
        "category": data.name,
        "train": len(data.train),
        "test_normal": len(data.test) - defective,
        "test_defective": defective,
        "masks": sum(sample.mask is not None for sample in data.test),
        "defects": _defects(data),
    }


def _defects(data: CategoryData) -> dict[str, int]:
    return dict(Counter(sample.defect for sample in data.test if sample.anomalous))
