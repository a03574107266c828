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
from training.datasets.open import DatasetLayout
from training.datasets.samples import CategoryData

LayoutOption = Annotated[
    DatasetLayout, typer.Option("--layout", help="How the data set lies on disk; auto looks for each layout's marks.")
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


def exclude_faulty(
    data: Sequence[CategoryData], settings: Settings, *, decode: bool, strict: bool
) -> tuple[list[CategoryData], dict[str, str]]:
    """Check a data set before training, show what was found, and leave out the categories that have errors.

    Args:
        data: Its categories.
        settings: What training would go by.
        decode: Whether files are opened at all.
        strict: Refuse all categories where one has an error.

    Returns:
        The categories without errors, and by name why each of the others is not trained.

    Raises:
        DatasetError: Every category has errors, or one has and `strict` is set.
    """
    findings = find_faults(data, settings, decode=decode)
    show_findings(findings, err)
    errors = [found for found in findings if found.severity is Severity.ERROR]
    faulty = {name: list(found) for name, found in groupby(errors, lambda one: one.category)}  # findings are sorted
    sound = [one for one in data if one.name not in faulty]
    if faulty and (strict or not sound):
        raise DatasetError(
            f"the data set is not trained on, as its check found errors: {len(errors)}; mend what is listed above"
            f"{', or train the other categories without --strict' if sound else ''}"
        )
    return sound, {name: _why(found) for name, found in faulty.items()}


def _why(errors: Sequence[Finding]) -> str:
    """Say why a category is not trained, and the way out."""
    first = errors[0]
    return (
        f"not trained, as the check of its data found errors: {len(errors)}, the first: "
        f"{f'{first.path}: ' if first.path is not None else ''}{first.text}. Mend what `flawstream datasets check -c "
        f"{first.category}` lists, then train it alone with `-c {first.category}`"
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
