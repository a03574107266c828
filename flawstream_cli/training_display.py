"""Progress of training on the terminal: one bar a job, or plain lines where nobody watches."""

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flawstream_cli.terminal import err, printable, say
from training.pipeline import Progress as JobProgress
from training.pipeline import Stage


class TrainingDisplay:
    """Shows what `training.fleet.train_fleet` yields. A context manager.

    Args:
        jobs: Names, a bar each, in this order.
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
        self._said: dict[str, str] = {}

    def show(self, progress: JobProgress) -> None:
        """Take one report. What is said at a job's end is too long for a line of bars: the caller says it below."""
        has_more = progress.note and progress.stage in {Stage.DONE, Stage.FAILED}
        note = "see below" if has_more else progress.note
        self._bars.update(
            self._tasks[progress.job],
            stage=progress.stage.value,
            completed=progress.done,
            total=progress.total,
            note=printable(note).plain,
        )
        if not err.is_terminal:
            line = f"{progress.job}: {progress.stage.value} {note.partition('  ')[0]}".rstrip()
            if self._said.get(progress.job) != line:
                self._said[progress.job] = line
                say(line)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
