"""`flawstream train` ended before its end: by Ctrl-C, by SIGTERM, by the loss of the cluster."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.command_line import clean_environment
from helpers.image_files import write_images
from ray.cluster_utils import Cluster

from flawstream.registry.registry import Registry

DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for category in ("a", "b"):
        write_images(folder / category / "train" / "good", 12)
    return folder


@contextmanager
def training(folder: Path, registry: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start training with enough epochs for a signal to come in time."""
    process = subprocess.Popen(  # noqa: S603 - our own interpreter
        [
            *(sys.executable, "-m", "flawstream_cli", "train", str(folder), "--registry", str(registry), "--json"),
            *("--epochs", "100000", "--input-size", "64", "--no-check", *arguments),
        ],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    started_s = time.monotonic()
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return
        assert time.monotonic() - started_s < DEADLINE_S, lines
    pytest.fail("".join(lines))


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGINT, 130, "interrupted with Ctrl-C"), (signal.SIGTERM, 143, "ended by SIGTERM")],
)
def test_signal_ends_training_with_a_summary(
    folder: Path, tmp_path: Path, number: signal.Signals, code: int, reason: str
) -> None:
    with training(folder, tmp_path / "models") as process:
        wait_for_line(process, ": training")
        sent_s = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE_S)
        print(f"ended after {time.monotonic() - sent_s:.1f} s")  # noqa: T201 - shown if the test fails
    assert process.returncode == code, err
    assert f"ending ({reason})" in err
    assert "Traceback" not in err
    assert "*** SIG" not in err
    report = json.loads(out)
    assert report["trained"] == []
    assert sorted(report["failed"]) == ["a", "b"]
    assert reason in report["failed"]["b"]
    assert Registry(str(tmp_path / "models")).categories() == []


def test_signal_before_training_ends_with_a_document(folder: Path, tmp_path: Path) -> None:
    with training(folder, tmp_path / "models") as process:
        wait_for_line(process, "starting Ray")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143, err
    assert json.loads(out) == {"trained": [], "failed": {}, "warnings": {}, "error": "ended by a signal"}


def test_loss_of_the_cluster_ends_training_with_a_summary_and_its_own_code(folder: Path, tmp_path: Path) -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "dashboard_port": 0}
    )
    try:
        with training(folder, tmp_path / "models", "--ray", cluster.address) as process:
            wait_for_line(process, ": training")
            cluster.head_node.kill_gcs_server()
            out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        cluster.shutdown()
    assert process.returncode == 5, err
    assert "the head of the Ray cluster has not answered for 20 s" in err
    report = json.loads(out)
    assert report["trained"] == []
    assert sorted(report["failed"]) == ["a", "b"]


def test_json_is_printed_for_data_that_cannot_be_trained(tmp_path: Path) -> None:
    with training(tmp_path / "nothing", tmp_path / "models") as process:
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 3
    assert json.loads(out)["error"] in err
