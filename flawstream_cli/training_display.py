"""Shows the progress of training jobs: progress bars on a terminal, plain lines otherwise."""

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flawstream_cli.terminal import err, print_message, printable
from training.pipeline import Progress as JobProgress
from training.pipeline import Stage


class TrainingDisplay:
    """Shows the progress reports of `training.fleet.train_fleet`. A context manager.

    Args:
        jobs: Names of the jobs, in the order of their bars.
    """

    def __init__(self, jobs: list[str]) -> None:
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
        self._tasks: dict[str, TaskID] = {
            name: self._bars.add_task(name, total=None, stage="waiting", note="") for name in jobs
        }
        self._last_lines: dict[str, str] = {}

    def show(self, progress: JobProgress) -> None:
        """Show one report. The note of a finished job is too long for its bar: the caller prints it."""
        has_long_note = progress.note and progress.stage in {Stage.DONE, Stage.FAILED}
        note = "see below" if has_long_note else progress.note
        self._bars.update(
            self._tasks[progress.job],
            stage=progress.stage.value,
            completed=progress.done,
            total=progress.total,
            note=printable(note).plain,
        )
        if not err.is_terminal:
            line = f"{progress.job}: {progress.stage.value} {note.partition('  ')[0]}".rstrip()
            if self._last_lines.get(progress.job) != line:
                self._last_lines[progress.job] = line
                print_message(line)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
