"""Shared by the commands that read data sets: options, and checking a data set with the findings printed."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

from flawstream.imaging.pixels import PixelForm
from flawstream_cli.terminal import err, print_message, printable
from schemas.errors import DatasetError
from schemas.settings import Settings
from training.datasets.check import DatasetProblem, Finding, Severity, check_content, check_listing, exclusion_reason
from training.datasets.decoding import count_files, decode_files
from training.datasets.folders import has_folder, list_folders
from training.datasets.open import DatasetLayout
from training.datasets.samples import CategoryData
from training.datasets.storage import is_url, open_path

RootArgument = Annotated[
    str,
    typer.Argument(
        help="Data set, a folder or a URL such as s3://bucket/mvtec: ROOT/CATEGORY/train/good, test/DEFECT, "
        "ground_truth; or another --layout."
    ),
]
LayoutOption = Annotated[DatasetLayout, typer.Option("--layout", help="Layout of the data set; auto detects it.")]
CategoryOption = Annotated[
    list[str] | None, typer.Option("--category", "-c", help="Only this category; may be repeated.")
]
_STYLES = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "blue"}
_FINDINGS_PER_KIND = 5
"""Findings of one kind that are printed; the rest are counted."""


def find_faults(data: Sequence[CategoryData], settings: Settings, *, decode: bool = True) -> list[Finding]:
    """Check a data set and show a progress bar while its files are decoded.

    Args:
        data: The data set's categories.
        settings: The settings that training would use.
        decode: Whether to decode the files too; False checks names and counts only.

    Returns:
        Findings, errors first, then by category and kind.
    """
    findings: list[Finding] = []
    for category in data:
        findings += check_listing(category, settings.training)
        if not decode:
            continue
        total = count_files(category)
        if not err.is_terminal:
            print_message(f"{category.name}: checking {total} files ...")
        decoded = track(
            decode_files(category, PixelForm.of(settings.model), settings.limits),
            description=f"checking {category.name}",
            total=total,
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        findings += check_content(category, decoded, settings.limits, settings.training.bit_depths.get(category.name))
    return in_order(findings)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings: errors first, then by category and kind."""
    severities = list(Severity)
    return sorted(
        findings, key=lambda one: (severities.index(one.severity), one.category, one.problem, str(one.path or ""))
    )


def check_folders(root: str, data: Sequence[CategoryData]) -> list[Finding]:
    """Report folders beside the categories that look like one, and are not read.

    Args:
        root: The data set.
        data: All its categories.
    """
    names = {category.name for category in data}
    text = "has train/ without a folder good, normal or ok, so it is no category and is not read; rename what is there"
    return [
        Finding("", DatasetProblem.SUBFOLDER, folder, text)
        for folder in list_folders(open_path(root))
        if folder.name not in names and has_folder(folder, "train")
    ]


def check_registry(settings: Settings) -> list[Finding]:
    """Check whether training may write the registry, if it is a folder; writes nothing."""
    root = settings.registry.root
    if "://" in root or is_writable(Path(root)):
        return []
    text = "is the registry and cannot be written here; give this user the rights, or set another registry.root"
    return [Finding("", DatasetProblem.UNWRITABLE, Path(root), text)]


def is_writable(path: Path) -> bool:
    """Check whether a file or folder can be written, or be created with the folders above it; writes nothing."""
    path = path.absolute()
    if path.exists():
        return os.access(path, os.W_OK)
    above = next(folder for folder in path.parents if folder.exists())
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def exclude_faulty(
    data: Sequence[CategoryData], settings: Settings, *, decode: bool, strict: bool
) -> tuple[list[CategoryData], dict[str, str]]:
    """Check a data set before training, print the findings, and exclude the categories that have errors.

    Args:
        data: The data set's categories.
        settings: The settings that training would use.
        decode: Whether to decode the files too; False checks names and counts only. Without `strict`, the files of a
            URL are not decoded here, but by the trainers (`training.remote_data`).
        strict: Refuse all categories if one has an error.

    Returns:
        The categories without errors; and by name the reason why each other one is excluded.

    Raises:
        DatasetError: Every category has errors, or one has and `strict` is set.
    """
    here = decode and (strict or not any(map(is_url, (path for category in data for path in category.files()))))
    findings = find_faults(data, settings, decode=here)
    show_findings((finding for finding in findings if finding.severity is not Severity.NOTE), err)
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    errors_of = {name: list(group) for name, group in groupby(errors, lambda error: error.category)}  # sorted above
    sound = [category for category in data if category.name not in errors_of]
    if errors_of and (strict or not sound):
        raise DatasetError(
            f"nothing is trained: the check of the data set found errors: {len(errors)}; fix what is listed above"
            f"{', or train the other categories without --strict' if sound else ''}"
        )
    return sound, {name: exclusion_reason(group) for name, group in errors_of.items()}


def show_findings(findings: Iterable[Finding], console: Console) -> None:
    """Print findings, one a line; of each kind only the first few."""
    for (severity, category, _), group in groupby(
        findings, lambda finding: (finding.severity, finding.category, finding.problem)
    ):
        same_kind = list(group)
        for finding in same_kind[:_FINDINGS_PER_KIND]:
            location = f"{finding.path}: " if finding.path is not None else ""
            line = Text.assemble(
                (severity.value, _STYLES[severity]),
                printable(f" {f'{category}: ' if category else ''}{location}{finding.text}"),
            )
            console.print(line, highlight=False, soft_wrap=True)
        if hidden := len(same_kind[_FINDINGS_PER_KIND:]):
            console.print(printable(f"      {category}: and {hidden} more of this kind"), soft_wrap=True)


def count_severities(findings: Iterable[Finding]) -> tuple[int, int]:
    """Count errors and warnings."""
    counts = Counter(finding.severity for finding in findings)
    return counts[Severity.ERROR], counts[Severity.WARNING]
