"""The check of nodes before training, on a cluster of nodes that differ.

A node has a mount namespace of its own, in which it may see other folders under the same paths.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.image_files import write_images
from helpers.waiting import wait_until
from ray.cluster_utils import Cluster

DEADLINE_S = 120.0
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
    answer = {"silent": check_nodes(Path(sample), registry, deadline_s=60)}
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
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "dashboard_port": 0}
    )
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
def node(cluster: Cluster, name: str, *mounts: tuple[Path, Path], **environment: str) -> Iterator[None]:
    """Start a node that sees, under the second path of each pair, the first folder; it dies with the context."""
    binds = "".join(f"mount --bind {source} {target} && " for source, target in mounts)
    ray = Path(sys.executable).with_name("ray")
    command = f"{binds}exec {ray} start --address={cluster.address} --num-cpus=1 --node-name={name} --block"
    process = subprocess.Popen(  # noqa: S603
        ["/usr/bin/unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", command],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: name in names_of_nodes(cluster) or None, f"the node {name}", every_s=0.5)
        yield
    finally:
        process.kill()  # and with it all of its namespace
        process.wait()


def names_of_nodes(cluster: Cluster) -> set[str]:
    return {node["NodeName"] for node in cluster.global_state.node_table() if node["Alive"]}


def check(cluster: Cluster, sample: Path, registry: Path) -> dict[str, object]:
    ran = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", CHECK, cluster.address, str(sample), str(registry)],
        cwd=sample.parent,  # workers get the driver's folder in their path, and a checkout has the packages' versions
        check=True,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
    )
    answer: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])  # Ray may print the death of a node before
    print(answer)  # noqa: T201 - shown if the test fails
    return answer


def test_every_node_that_differs_is_named_and_those_that_died_are_left_out(
    cluster: Cluster, sample: Path, tmp_path: Path
) -> None:
    data, empty, models = (tmp_path / name for name in ("data", "empty", "models"))
    (tmp_path / "other" / "flawstream-9.9.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "flawstream-9.9.dist-info" / "METADATA").write_text("Name: flawstream\nVersion: 9.9\n")
    other = f"{tmp_path / 'other'}:{os.environ.get('PYTHONPATH', '')}"
    with (
        node(cluster, "alike"),
        node(cluster, "elsewhere", (empty, models), (empty, data)),
        node(cluster, "newer", PYTHONPATH=other),
    ):
        error = str(check(cluster, sample, models)["error"])
        assert list(models.iterdir()) == []
        assert list(empty.iterdir()) == []
    problems = [problem for problem in error.split("; node ") if "(newer" in problem]
    assert len(problems) == 1
    assert "has flawstream 9.9, and the driver has " in problems[0]
    assert "(alike" not in error
    assert f"cannot read {sample}" in error
    assert f"has another registry: {models} is not the same storage there" in error
    assert error.count("(elsewhere") == 2
    answer = check(cluster, sample, models)  # Ray notices a dead node after some time only
    assert "error" not in answer


def test_train_ends_with_exit_code_3_before_any_training(cluster: Cluster, sample: Path, tmp_path: Path) -> None:
    with node(cluster, "elsewhere", (tmp_path / "empty", tmp_path / "models")):
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
