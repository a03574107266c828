"""The check of nodes before training, on a cluster of two nodes of which one differs.

The second node has a mount namespace of its own, in which it sees other folders under the same paths.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.image_files import write_images
from ray.cluster_utils import Cluster

DEADLINE_S = 60.0
CHECK = """
import json, sys, time
from pathlib import Path
import ray
from schemas.errors import ConfigError
from training.preflight import check_nodes

address, sample, registry = sys.argv[1:]
ray.init(address, log_to_driver=False)
started_s = time.monotonic()
try:
    answer = {"silent": check_nodes(Path(sample), registry)}
except ConfigError as error:
    answer = {"error": str(error)}
print(json.dumps(answer | {"seconds": time.monotonic() - started_s}))
"""

pytestmark = pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="needs the right to make a mount namespace"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a head with one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "models").mkdir()
    return write_images(tmp_path / "data" / "bottle" / "train" / "good", 10)[0]


@contextlib.contextmanager
def second_node(cluster: Cluster, *mounts: tuple[Path, Path], **environment: str) -> Iterator[None]:
    """Start a node that sees, under the second path of each pair, the folder that has the first."""
    binds = "".join(f"mount --bind {source} {target} && " for source, target in mounts)
    ray = Path(sys.executable).with_name("ray")
    command = f"{binds}exec {ray} start --address={cluster.address} --num-cpus=1 --block"
    before = count_nodes(cluster)
    node = subprocess.Popen(  # noqa: S603
        ["/usr/bin/unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", command],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_for_nodes(cluster, before + 1)
        yield
    finally:
        node.kill()  # and with it all of its namespace
        node.wait()


def count_nodes(cluster: Cluster) -> int:
    return sum(node["Alive"] for node in cluster.global_state.node_table())


def wait_for_nodes(cluster: Cluster, count: int) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while count_nodes(cluster) != count:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def check(cluster: Cluster, sample: Path, registry: Path) -> dict[str, object]:
    ran = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", CHECK, cluster.address, str(sample), str(registry)],
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    answer: dict[str, object] = json.loads(ran.stdout)
    print(answer)  # noqa: T201 - shown if the test fails
    return answer


def test_nodes_that_share_all_pass_and_nothing_is_left(cluster: Cluster, sample: Path, tmp_path: Path) -> None:
    with second_node(cluster):
        assert check(cluster, sample, tmp_path / "models")["silent"] == []
        assert list((tmp_path / "models").iterdir()) == []


def test_node_with_other_registry_and_without_the_data_is_named(cluster: Cluster, sample: Path, tmp_path: Path) -> None:
    with second_node(cluster, (tmp_path / "empty", tmp_path / "models"), (tmp_path / "empty", tmp_path / "data")):
        error = str(check(cluster, sample, tmp_path / "models")["error"])
    assert error.count("node ") == 2
    assert f"cannot read {sample}" in error
    assert f"has another registry: {tmp_path / 'models'} is not the same storage there" in error


def test_node_with_another_release_is_named(cluster: Cluster, sample: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "flawstream-9.9.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "flawstream-9.9.dist-info" / "METADATA").write_text("Name: flawstream\nVersion: 9.9\n")
    path = f"{tmp_path / 'other'}:{os.environ.get('PYTHONPATH', '')}"
    with second_node(cluster, PYTHONPATH=path):
        error = str(check(cluster, sample, tmp_path / "models")["error"])
    assert "has flawstream 9.9, and the driver has " in error
    assert "torch" not in error


def test_node_that_died_a_moment_ago_is_reported_and_does_not_prevent_training(
    cluster: Cluster, sample: Path, tmp_path: Path
) -> None:
    with second_node(cluster):
        pass
    assert count_nodes(cluster) >= 1
    answer = check(cluster, sample, tmp_path / "models")
    assert "error" not in answer


def test_train_ends_with_exit_code_3_before_any_training(cluster: Cluster, sample: Path, tmp_path: Path) -> None:
    with second_node(cluster, (tmp_path / "empty", tmp_path / "models")):
        ran = subprocess.run(  # noqa: S603 - our own interpreter
            [
                *(sys.executable, "-m", "flawstream_cli", "train", str(tmp_path / "data"), "--ray", cluster.address),
                *("--registry", str(tmp_path / "models"), "--input-size", "64", "--json"),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S,
        )
    assert sample.is_file()
    assert ran.returncode == 3, ran.stderr
    assert "has another registry" in ran.stderr
    assert "has another registry" in json.loads(ran.stdout)["error"]
    assert list((tmp_path / "models").iterdir()) == []
    assert list((tmp_path / "empty").iterdir()) == []
