"""Short forms of the long tests: `make test-chaos`, `-chaos-training`, `-fuzz`, `-leaks`, `-score`, `-simulation`."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from helpers.places import ROOT, TESTS
from soak.chaos_faults import KINDS

pytestmark = pytest.mark.timeout(900)

SIMULATED_FAULTS = 15


def run(program: str, *options: str) -> dict[str, Any]:
    """Run one of the long tests; gives what its last line says."""
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-m", f"soak.{program}", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_every_image_ends_once_and_in_time_though_everything_is_killed_cut_off_and_paused() -> None:
    report = run("chaos", "--minutes", "1", "--pause", "2")
    failures = ("lost", "duplicates", "falsely_dead", "stuck", "wrong_ending", "unread_by_group")
    assert [report[name] for name in failures] == [0] * len(failures)
    assert report["images"] > 0
    assert report["longest_recovery_s"] > 0
    assert set(report["faults"]) | set(report["skipped"]) == set(KINDS)


def test_no_simulated_fault_loses_doubles_blames_or_holds_up_an_image() -> None:
    report = run("simulation", "--episodes", "12")
    failures = ("lost", "duplicates", "falsely_dead", "falsely_good", "stuck")
    assert [report[name] for name in failures] == [0, 0, 0, 0, 0]
    assert report["endings"] == 12_000
    assert report["faults"] > 100
    assert len(report["kinds"]) == SIMULATED_FAULTS


def test_malformed_entries_are_dead_lettered_for_the_right_reason_and_harm_nobody() -> None:
    report = run("fuzz", "--entries", "600", "--no-costs")  # CPU time is no matter of a test
    assert (report["lost"], report["duplicates"], report["wrong_reason"], report["worker_restarts"]) == (0, 0, 0, 0)
    assert report["dead"] >= 600


def test_memory_of_a_trainer_and_of_detectors_stays_as_it_is() -> None:
    """Few categories and loads; `make test-leaks` does 200 and 1,000. The program fails where memory grows."""
    report = run("leaks", "--categories", "8", "--loads", "20", "--engines", "openvino", "ncnn")
    assert report["ok"]
    assert set(report) >= {"trainer", "openvino", "ncnn"}


def test_scoring_that_is_killed_and_continued_scores_every_image_once_as_a_worker_does() -> None:
    report = run("score", "--images", "400", "--images-per-part", "25", "--compare", "200")
    assert (report["rows"], report["missing"], report["doubled"]) == (400, 0, 0)
    assert (report["other_version"], report["different"], report["compared"]) == (0, 0, 200)
    assert (report["actors_killed"], report["commands_killed"]) == (1, 2)


def test_training_ends_with_the_same_weights_though_a_node_is_lost() -> None:
    cases = ["raylet_killed"]
    report = run("chaos_training", "--categories", "4", "--cases", ",".join(cases))
    assert (report["categories"], report["trained"], report["equal"], report["half_written"]) == (4, 4, 4, 0)
    assert set(report["cases"]) <= set(cases)
    for case in report["cases"].values():
        assert (case["exit_code"], case["doubled"]) == (0, 0)
