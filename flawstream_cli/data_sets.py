"""What the commands that read data sets share: their options, and a data set's check with its findings shown."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

from flawstream.imaging.pixels import PixelForm
from flawstream_cli.terminal import err, printable, say
from schemas.errors import DatasetError
from schemas.settings import Settings
from training.datasets.check import Finding, Severity, check_content, check_listing
from training.datasets.decoding import count_files, decode_files
from training.datasets.open import Layout
from training.datasets.samples import CategoryData

LayoutOption = Annotated[
    Layout, typer.Option("--layout", help="How the data set lies on disk; auto looks for each layout's marks.")
]
CategoryOption = Annotated[
    list[str] | None, typer.Option("--category", "-c", help="Only this category; may be given again.")
]
_SHOWN = 5


def find_faults(data: Sequence[CategoryData], settings: Settings, *, decode: bool = True) -> list[Finding]:
    """Check a data set, with a bar while files are decoded.

    Args:
        data: Its categories.
        settings: What training would go by.
        decode: Whether files are opened at all.

    Returns:
        Errors first, then by category and kind.
    """
    findings: list[Finding] = []
    for one in data:
        findings += check_listing(one, settings.training)
        if not decode:
            continue
        total = count_files(one)
        if not err.is_terminal:
            say(f"{one.name}: checking {total} files ...")
        seen = track(
            decode_files(one, PixelForm.of(settings.model), settings.limits),
            description=f"checking {one.name}",
            total=total,
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        findings += check_content(one, seen)
    return sorted(findings, key=lambda found: (found.severity, found.category, found.problem, str(found.path or "")))


def refuse_faulty(data: Sequence[CategoryData], settings: Settings, *, decode: bool) -> None:
    """Check a data set before training and show what was found.

    Raises:
        DatasetError: Something is wrong that training must not go past.
    """
    findings = find_faults(data, settings, decode=decode)
    show_findings(findings, err)
    errors = [found for found in findings if found.severity is Severity.ERROR]
    if errors:
        raise DatasetError(
            f"the data set is not trained on, as its check found errors: {len(errors)}; mend what is listed above"
            f"{'' if len(data) == 1 else ', or leave a category out with --category'}"
        )


def show_findings(findings: Iterable[Finding], console: Console) -> None:
    """Print findings, a line each; of many of one kind the first few."""
    for (severity, category, _), found in groupby(findings, lambda one: (one.severity, one.category, one.problem)):
        same = list(found)
        for one in same[:_SHOWN]:
            where = f"{one.path}: " if one.path is not None else ""
            line = Text.assemble(
                (severity.value, "red" if severity is Severity.ERROR else "yellow"),
                printable(f" {category}: {where}{one.text}"),
            )
            console.print(line, highlight=False, soft_wrap=True)
        if len(same) > _SHOWN:
            console.print(printable(f"      {category}: and {len(same) - _SHOWN} more of this kind"), soft_wrap=True)


def count_severities(findings: Iterable[Finding]) -> tuple[int, int]:
    """Count errors and warnings."""
    counts = Counter(found.severity for found in findings)
    return counts[Severity.ERROR], counts[Severity.WARNING]
