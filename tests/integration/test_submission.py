"""`flawstream train` as a Ray Job on a real cluster, with a real dashboard."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import clean_environment
from helpers.image_files import write_images
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from flawstream.registry.registry import Registry
from flawstream_cli.main import main
from flawstream_cli.submission import submit_job
from schemas.errors import ConfigError
from schemas.settings import Settings
from workers.redis.embedded import free_port

DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Start a cluster of one node with a dashboard; give the dashboard's address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # jobs run `flawstream`
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": True,
                "dashboard_port": 0,
                "dashboard_host": "127.0.0.1",
                "dashboard_agent_listen_port": free_port(),  # the default is taken by another cluster's agent
            },
        )
        try:
            yield f"http://{cluster.webui_url}"
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "bottle" / "train" / "good", 12)
    write_images(folder / "cable" / "train" / "good", 3)
    return folder


def train(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-m", "flawstream_cli", "train", *map(str, arguments)],
        env=clean_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_job_joins_its_cluster_with_the_settings_and_ends_with_its_code_and_document(
    dashboard: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_text(f"registry: {{root: {tmp_path / 'models'}}}\ntraining: {{epochs: 2}}\n")
    process = train(
        *(folder, "--submit", dashboard, "--config", tmp_path / "settings.yaml", "--json"),
        FLAWSTREAM_MODEL__INPUT_SIZE="64",
    )
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, err  # as one category has too few images
    report = json.loads(out)
    (trained,) = report["trained"]
    assert (trained["category"], trained["training"]["epochs"]) == ("bottle", 2)
    assert trained["backbone"]["input_size"] == 64
    assert list(report["failed"]) == ["cable"]
    assert "connecting to Ray at" in err
    assert "starting Ray" not in err
    assert "bottle: done" in err
    assert Registry(str(tmp_path / "models")).current("bottle") == trained["version"]


def test_ctrl_c_leaves_the_job_running_and_names_the_commands_to_follow_and_stop_it(
    dashboard: str, folder: Path, tmp_path: Path
) -> None:
    process = train(folder, "-c", "bottle", "--epochs", 5000, "--registry", tmp_path / "models", "--submit", dashboard)
    assert process.stderr is not None
    job = next(line for line in process.stderr if line.startswith("submitted ")).split()[1].rstrip(";")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert f"{job} goes on" in err
    assert f"ray job stop --address {dashboard} {job}" in err
    client = JobSubmissionClient(dashboard)
    assert client.get_job_status(job) in {JobStatus.PENDING, JobStatus.RUNNING}
    client.stop_job(job)


def test_job_that_is_not_followed_is_named(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(tmp_path / "nothing"), "--registry", str(tmp_path), "--submit", dashboard, "--no-follow"]
    monkeypatch.setattr(sys, "argv", ["flawstream", *arguments, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    submitted = json.loads(capsys.readouterr().out)
    assert submitted["address"] == dashboard
    assert JobSubmissionClient(dashboard).get_job_info(submitted["job"]).entrypoint.startswith("flawstream train /")


def test_cluster_with_a_token_refuses_a_job_without_it(tmp_path: Path) -> None:
    token = "0123456789abcdef" * 4
    script = f"""
import time
from ray.cluster_utils import Cluster
ports = dict(dashboard_port=0, dashboard_agent_listen_port={free_port()})
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=True, **ports))
print(cluster.webui_url, flush=True)
time.sleep({DEADLINE_S})
"""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as head:
        try:
            assert head.stdout is not None  # ends with the process, which ends by itself
            address = f"http://{next(line for line in head.stdout if ':' in line).strip()}"
            process = train("/nothing", "--registry", tmp_path, "--submit", address, RAY_AUTH_MODE="disabled")
            _, err = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 3, err
            assert f"the cluster at {address} needs its token: set RAY_AUTH_MODE=token" in err
            process = train(
                "/nothing", "--registry", tmp_path, "--submit", address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token
            )
            out, err = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 3, err
            assert "/nothing does not exist" in out + err
        finally:
            head.send_signal(signal.SIGINT)
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                head.kill()


def test_dashboard_that_does_not_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9 "):
        submit_job("http://127.0.0.1:9", ["train", "s3://photos"], Settings(), {}, follow=False, as_json=False)


@pytest.mark.parametrize("name", ["ROOT", "--registry"])
def test_relative_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} 'data' is a relative path, but the job runs on the cluster"):
        submit_job("http://127.0.0.1:9", ["train"], Settings(), {name: "data"}, follow=False, as_json=False)
