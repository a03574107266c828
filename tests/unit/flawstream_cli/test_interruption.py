"""Signals and a lost cluster while training, with real signals and without Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from flawstream_cli import interruption
from flawstream_cli.interruption import ending_in_order
from flawstream_cli.terminal import ExitCode
from schemas.errors import ConfigError
from training.pipeline import Progress, Stage

REASONS = {signal.SIGINT: "interrupted with Ctrl-C", signal.SIGTERM: "ended by SIGTERM"}
CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}


def endless(closed: list[bool]) -> Iterator[Progress]:
    """Train `a`, then `b` for ever; note that the generator was closed."""
    try:
        yield Progress("a", Stage.DONE, 1, 1)
        while True:
            time.sleep(0.01)
            yield Progress("b", Stage.TRAINING, 1, 10)
    finally:
        closed.append(True)


@pytest.mark.parametrize("number", REASONS)
def test_signal_in_the_caller_ends_training_and_reports_the_other_jobs(number: signal.Signals) -> None:
    closed: list[bool] = []
    handlers = [signal.getsignal(each) for each in REASONS]
    with ending_in_order(as_json=True) as ending:
        seen = []
        for progress in ending.watch(endless(closed), ["a", "b", "c"]):
            seen.append(progress)
            if len(seen) == 3:
                signal.raise_signal(number)
    assert closed == [True]
    assert [(each.job, each.stage) for each in seen[-2:]] == [("b", Stage.FAILED), ("c", Stage.FAILED)]
    assert all(REASONS[number] in each.note for each in seen[-2:])
    assert ending.exit_code(failed=True) == CODES[number]
    assert handlers == [signal.getsignal(each) for each in REASONS]


@pytest.mark.parametrize("number", REASONS)
def test_signal_ends_training_that_reports_nothing(number: signal.Signals) -> None:
    def silent() -> Iterator[Progress]:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(60)
        yield Progress("a", Stage.DONE, 1, 1)

    def forward(*_: object) -> None:
        signal.raise_signal(number)

    before = signal.signal(signal.SIGALRM, forward)
    try:
        with ending_in_order(as_json=True) as ending:
            (only,) = ending.watch(silent(), ["a"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (only.job, only.stage) == ("a", Stage.FAILED)
    assert ending.code == CODES[number]


def test_signal_within_a_call_of_ray_ends_training_too() -> None:
    def waits_in_ray() -> Iterator[Progress]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # Ray raises the bare class, whatever the handler has raised
        yield Progress("a", Stage.DONE, 1, 1)

    with ending_in_order(as_json=True) as ending:
        (only,) = ending.watch(waits_in_ray(), ["a"])
    assert (only.job, only.stage, ending.code) == ("a", Stage.FAILED, ExitCode.TERMINATED)


@pytest.mark.parametrize("number", REASONS)
def test_signal_before_training_leaves_one_document(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, ending_in_order(as_json=True):
        signal.raise_signal(number)
    assert ended.value.code == CODES[number]
    assert json.loads(capsys.readouterr().out)["error"] == "ended by a signal"


def test_error_leaves_one_document_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError), ending_in_order(as_json=True):
        raise ConfigError("no weights")
    assert json.loads(capsys.readouterr().out) == {"trained": [], "failed": {}, "warnings": {}, "error": "no weights"}


def test_signal_after_training_leaves_the_summary_whole() -> None:
    with ending_in_order(as_json=True) as ending:
        assert len(list(ending.watch(iter([Progress("a", Stage.DONE, 1, 1)]), ["a"]))) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        summary = "printed"
    assert summary == "printed"
    assert ending.exit_code(failed=False) == ExitCode.TERMINATED


def test_head_that_does_not_answer_ends_training_with_a_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "_ASK_EVERY_S", 0.05)
    monkeypatch.setattr(interruption, "_LOST_AFTER_S", 0.2)
    closed: list[bool] = []
    with socket.create_server(("127.0.0.1", 0)) as head, ending_in_order(as_json=True) as ending:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        seen = []
        for number, progress in enumerate(ending.watch(endless(closed), ["a", "b"], address)):
            seen.append(progress)
            if number == 100:
                assert ending.code is None
                head.close()
    assert closed == [True]
    assert len(seen) > 100
    assert seen[-1].note.startswith("not trained: the head of the Ray cluster has not answered for")
    assert ending.exit_code(failed=True) == ExitCode.CLUSTER_LOST


@pytest.mark.parametrize(("failed", "code"), [(False, ExitCode.OK), (True, ExitCode.FAILED)])
def test_training_that_ends_by_itself_keeps_its_code(failed: bool, code: ExitCode) -> None:  # noqa: FBT001
    with ending_in_order(as_json=False) as ending:
        assert ending.exit_code(failed=failed) == code


HANGING = """
import sys, time
from contextlib import redirect_stdout
from flawstream_cli import interruption
from training.pipeline import Progress, Stage
interruption._ASK_EVERY_S, interruption._LOST_AFTER_S, interruption._GRACE_S = 0.05, 0.2, 0.3

def hangs():
    yield Progress("a", Stage.DONE, 1, 1)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass

with interruption.ending_in_order(as_json=True) as ending, redirect_stdout(sys.stderr):
    print("printed by Ray")
    list(ending.watch(hangs(), ["a", "b"], "127.0.0.1:9"))
"""


def test_main_thread_that_waits_for_a_lost_head_does_not_keep_the_summary() -> None:
    ran = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", HANGING], check=False, capture_output=True, text=True
    )
    assert ran.returncode == ExitCode.CLUSTER_LOST, ran.stderr
    assert list(json.loads(ran.stdout)["failed"]) == ["b"]
    assert "b failed: not trained: the head of the Ray cluster" in ran.stderr
