"""Ctrl-C, SIGTERM and a lost cluster while training: the run ends with its summary and an exit code of its own."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from types import FrameType

import typer

from flawstream_cli.cluster import knock
from flawstream_cli.terminal import ExitCode, print_json, print_message
from schemas.manifest import ModelManifest
from training.pipeline import Progress, Stage

_LOST_SIGNAL = signal.SIGUSR2
_ASK_EVERY_S = 2.0
_LOST_AFTER_S = 20.0
"""Ray itself ends the process after 60 s without the cluster's head."""
_GRACE_S = 10.0
"""For the main thread to end in order after that."""


class _Ended(KeyboardInterrupt):
    """Raised in the main thread when the run must end."""


class Ending:
    """How a training run ends. Made by `ending_in_order`.

    Attributes:
        code: The exit code if the run was ended before its end, else None.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._trained: list[ModelManifest] = []
        self._open_jobs: dict[str, None] = {}
        self.code: ExitCode | None = None
        self._may_raise = True

    def watch(self, training: Iterator[Progress], jobs: Sequence[str], head: str = "") -> Iterator[Progress]:
        """Pass on the progress of training; once the run must end, close it and report every other job as failed.

        Args:
            training: The training, closed at the end.
            jobs: Names of the jobs.
            head: Address `host:port` of the cluster's head, whose loss ends the run; empty: not watched.

        Yields:
            Progress; every job ends in `DONE` or `FAILED`.
        """
        self._open_jobs = dict.fromkeys(jobs)
        stop = threading.Event()
        if head:
            threading.Thread(target=self._watch_head, args=(head, stop), daemon=True).start()
        try:
            with closing(training) if isinstance(training, Generator) else nullcontext():
                while self.code is None and (progress := next(training, None)) is not None:
                    if progress.stage in {Stage.DONE, Stage.FAILED}:
                        self._open_jobs.pop(progress.job, None)
                        self._trained += [progress.manifest] if progress.manifest is not None else []
                    self._may_raise = False  # the caller may be writing to the registry
                    yield progress
                    self._may_raise = True
        except KeyboardInterrupt:  # not _Ended only: within a call of Ray it becomes the bare class
            pass
        finally:
            self._may_raise = False  # the summary follows
            stop.set()
        for job, reason in self._not_trained().items():
            yield Progress(job, Stage.FAILED, 0, 1, reason)

    def exit_code(self, *, failed: bool) -> ExitCode:
        """Return the exit code of the run.

        Args:
            failed: Whether a category was not trained.
        """
        return self.code or (ExitCode.FAILED if failed else ExitCode.OK)

    def leave(self, *, failed: bool) -> None:
        """End the command with its exit code, after the summary. Without a head, Ray would not let the process end.

        Args:
            failed: Whether a category was not trained.

        Raises:
            typer.Exit: The exit code is not 0.
        """
        code = self.exit_code(failed=failed)
        if code is ExitCode.CLUSTER_LOST:
            sys.stdout.flush()
            os._exit(code)
        if code:
            raise typer.Exit(code)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first ends the run in order, the second at once."""
        del frame
        if self.code is not None:
            os._exit(self.code)
        self.code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED
        print_message(f"ending ({self._reason}); once more ends at once", "yellow")
        if self._may_raise:
            raise _Ended

    def on_lost(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal of the thread that has found the head lost."""
        del number, frame
        if self._may_raise:
            raise _Ended

    @property
    def _reason(self) -> str:
        match self.code:
            case ExitCode.INTERRUPTED:
                return "interrupted with Ctrl-C"
            case ExitCode.TERMINATED:
                return "ended by SIGTERM"
            case _:
                return f"the head of the Ray cluster has not answered for {_LOST_AFTER_S:.0f} s"

    def _watch_head(self, head: str, stop: threading.Event) -> None:
        silent_s = 0.0
        while silent_s < _LOST_AFTER_S:
            if stop.wait(_ASK_EVERY_S):
                return
            try:
                knock(head, _ASK_EVERY_S)
                silent_s = 0.0
            except OSError as error:
                silent_s += _ASK_EVERY_S * (2 if isinstance(error, TimeoutError) else 1)
        self.code = ExitCode.CLUSTER_LOST
        print_message(f"ending: {self._reason}", "red")
        _thread.interrupt_main(_LOST_SIGNAL)
        if not stop.wait(_GRACE_S):  # the main thread waits in Ray for an answer of the head
            self._give_up()

    def _give_up(self) -> None:
        """Print the summary and end the process from the watching thread."""
        failed = self._not_trained()
        for name, reason in failed.items():
            print_message(f"{name} failed: {reason}", "red")
        if self._as_json:
            trained = [manifest.model_dump(mode="json", exclude={"calibration"}) for manifest in self._trained]
            print_json({"trained": trained, "failed": failed, "warnings": {}, "error": self._reason}, sys.__stdout__)
        os._exit(ExitCode.CLUSTER_LOST)

    def _not_trained(self) -> dict[str, str]:
        return dict.fromkeys(self._open_jobs, f"not trained: {self._reason}; run the command again")


@contextmanager
def ending_in_order(*, as_json: bool) -> Iterator[Ending]:
    """Have Ctrl-C and SIGTERM end the run in order; with JSON, print a document for any error.

    Args:
        as_json: Whether standard output must be one JSON document.

    Raises:
        SystemExit: A signal came before or after training.
    """
    ending = Ending(as_json=as_json)
    before = {number: signal.signal(number, ending.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    before[_LOST_SIGNAL] = signal.signal(_LOST_SIGNAL, ending.on_lost)
    try:
        yield ending
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        # while it starts, Ray has a handler of its own in place of ours
        print_message("ending (ended by SIGTERM)", "yellow")
        if as_json:
            _print_error("ended by a signal")
        raise SystemExit(ExitCode.TERMINATED) from None
    except (Exception, KeyboardInterrupt) as error:
        if as_json:
            _print_error(str(error) or "ended by a signal")
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(ending.code or ExitCode.INTERRUPTED) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_error(text: str) -> None:
    print_json({"trained": [], "failed": {}, "warnings": {}, "error": text})
