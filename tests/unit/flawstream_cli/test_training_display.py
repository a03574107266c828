"""Lines about training without a terminal: few, and with what is left."""

import pytest

from flawstream_cli.training_display import TrainingDisplay
from training.pipeline import Progress, Stage


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_job_has_a_line_each_30_s_at_most_and_one_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with TrainingDisplay(["bottle", "cable", "tile"], clock) as display:
        for step in range(1, 700):
            clock.now_s = step / 10
            for job in ("bottle", "cable"):
                note = f"epoch {step}/999  loss {1 / step:.3f}"
                display.show(Progress(job, Stage.TRAINING, step, 999, note, epoch=step, loss=1 / step))
        clock.now_s = 100.0
        display.show(Progress("bottle", Stage.DONE, 1, 1))
        display.show(Progress("cable", Stage.FAILED, 0, 1, "the disk is full"))
        display.show(Progress("tile", Stage.DONE, 1, 1))
    assert capsys.readouterr().err.splitlines() == [
        "bottle: training epoch 301/999  loss 0.003",
        "cable: training epoch 301/999  loss 0.003",
        "bottle: training epoch 601/999  loss 0.002",
        "cable: training epoch 601/999  loss 0.002",
        "bottle: done (1 of 3, 3 min left)",
        "cable: failed see below (2 of 3, 50 s left)",
        "tile: done (3 of 3)",
    ]


def test_retry_is_shown_at_once_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(["bottle"], Clock()) as display:
        display.show(Progress("bottle", Stage.TRAINING, 1, 9))
        display.show(Progress("bottle", Stage.WAITING, 0, 1, "retry 1 of 3: its trainer on a was lost: out of memory"))
    assert capsys.readouterr().err.splitlines() == [
        "bottle: waiting retry 1 of 3: its trainer on a was lost: out of memory"
    ]
