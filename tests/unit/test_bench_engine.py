"""What `bench.engine` prints: the last line is read by programs."""

import json

import pytest

from bench.engine import BATCHES, Compared, Contender, show, take_turns

pytestmark = pytest.mark.unit


def contender(kind: str, name: str, images_per_s: float, *, serves: bool = False) -> Contender:
    """Make one that is equally fast in every batch, and is measured."""
    found = Contender(kind, name, serves, lambda batch, runs: [batch / images_per_s] * runs)
    for batch in BATCHES:
        found.seconds[batch] += found.turn(batch, 3)
    return found


COMPARED = [
    Compared(
        "resnet18",
        [
            contender("trained", "ncnn float32", 30, serves=True),
            contender("trained", "torch float32", 90),
            contender("imported", "ncnn float32", 40, serves=True),
            contender("anomalib", "torch eager", 10),
            contender("anomalib", "to_openvino f32", 20),
        ],
    ),
    Compared(
        "tf_efficientnet_lite0",
        [contender("trained", "ncnn float32", 60, serves=True), contender("anomalib", "torch eager", 80)],
    ),
]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    show(COMPARED)
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_ratio_is_of_what_serves_to_the_faster_of_anomalibs(capsys: pytest.CaptureFixture[str]) -> None:
    trained = last_line(capsys)["trained"]
    assert set(trained) == {"resnet18", "tf_efficientnet_lite0"}
    for batch in ("1", "8", "32"):
        one = trained["resnet18"]
        assert (one["ours"][batch], one["anomalib"][batch], one["ratio"][batch]) == (30, 20, 1.5)
        assert trained["tf_efficientnet_lite0"]["ratio"][batch] == 0.75


def test_imported_versions_are_reported_apart(capsys: pytest.CaptureFixture[str]) -> None:
    imported = last_line(capsys)["imported"]
    assert set(imported) == {"resnet18"}
    assert imported["resnet18"]["ratio"] == {"1": 2, "8": 2, "32": 2}


def test_first_round_and_the_first_run_of_a_turn_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.engine.PAUSE_S", 0.0)
    asked: list[tuple[int, int]] = []

    def turn(batch: int, runs: int) -> list[float]:
        asked.append((batch, runs))
        return [float(len(asked))] * runs

    one = Contender("trained", "ncnn float32", serves=True, turn=turn)
    take_turns([one], rounds=2)
    assert [batch for batch, _ in asked] == [*BATCHES] * 3
    for number, batch in enumerate(BATCHES):
        runs = asked[number][1] - 1
        first, second = len(BATCHES) + number + 1, 2 * len(BATCHES) + number + 1
        assert one.seconds[batch] == [first] * runs + [second] * runs
