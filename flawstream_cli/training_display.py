"""Shows the progress of training jobs: progress bars on a terminal, plain lines otherwise."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flawstream_cli.terminal import err, print_message, printable
from training.pipeline import Progress as JobProgress
from training.pipeline import Stage

_LINE_S = 30.0
"""Least time between two lines about a job, except its last."""
_ALL_SHOWN = 20
"""Of more jobs than this, only the running ones have a bar."""
_ENDED = {Stage.DONE, Stage.FAILED}


class TrainingDisplay:
    """Shows the progress reports of `training.fleet.train_fleet`. A context manager.

    Args:
        jobs: Names of the jobs, in the order of their bars.
        now: A clock, s.
    """

    def __init__(self, jobs: list[str], now: Callable[[], float] = time.monotonic) -> None:
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            TextColumn("{task.fields[stage]}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        self._now, self._start_s = now, now()
        self._ended, self._count = 0, len(jobs)
        self._keep_shown = len(jobs) <= _ALL_SHOWN
        self._overall = self._bars.add_task("all", total=len(jobs), stage="", note="", visible=len(jobs) > 1)
        self._tasks: dict[str, TaskID] = {
            name: self._bars.add_task(name, total=None, stage="waiting", note="", visible=self._keep_shown)
            for name in jobs
        }
        self._last_line_s: dict[str, float] = {}

    def show(self, progress: JobProgress) -> None:
        """Show one report. The note of a finished job is too long for its bar: the caller prints it."""
        has_ended, waits = progress.stage in _ENDED, progress.stage is Stage.WAITING
        note = "see below" if progress.note and has_ended else progress.note
        self._bars.update(
            self._tasks[progress.job],
            stage=progress.stage.value,
            completed=progress.done,
            total=progress.total,
            note="" if waits else printable(note).plain,
            visible=self._keep_shown or not has_ended,
        )
        if has_ended:
            self._ended += 1
            self._bars.update(self._overall, completed=self._ended, note=f"{self._ended} of {self._count}")
        now_s = self._now()
        is_due = has_ended or now_s - self._last_line_s.setdefault(progress.job, now_s) >= _LINE_S
        if waits or (is_due and not err.is_terminal):
            self._last_line_s[progress.job] = now_s
            overall = f" ({self._overall_line(now_s)})" if has_ended and self._count > 1 else ""
            print_message(f"{progress.job}: {progress.stage.value} {note}".rstrip() + overall)

    def _overall_line(self, now_s: float) -> str:
        """Describe how many jobs have ended, and how long the others take at this pace."""
        left_s = (now_s - self._start_s) / self._ended * (self._count - self._ended)
        left = f", {left_s / 60:.0f} min left" if left_s >= 90 else f", {left_s:.0f} s left"  # noqa: PLR2004 - 1.5 min
        return f"{self._ended} of {self._count}{left if self._ended < self._count else ''}"

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
