"""docs/deploy.md: every command on it runs, or is held against what the chart renders with the values that stand there.

Nothing is left out: a program that is in no list of page.py is not found. Of kubectl, docker and the Helm commands that
need a cluster only the words are checked, as there is no cluster.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml
from helm_python import Chart, lint, parse_set_string
from helpers.chart import conformity, links
from helpers.chart.page import Ran, commands, files, session
from helpers.chart.rendered import CHART, NAMESPACE, RELEASE, Body, merged, owner, pods, render
from helpers.fakes import FakeDetector, png
from helpers.image_files import write_category
from helpers.places import ROOT
from helpers.raw_redis import RawRedis
from helpers.tiny_models import write_version

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.settings import ApiSettings, LimitSettings, RedisSettings, Settings
from serving.api.api import build_api
from workers.produce.producer import Producer
from workers.redis.embedded import EmbeddedServer

PAGE = (ROOT / "docs" / "deploy.md").read_text()
FILES = files(PAGE)
OTHERS_CHARTS = ("kuberay/kuberay-operator", "kuberay-operator-1.6.0.tgz")
OURS = "flawstream-0.1.0.tgz"
NOT_OF_THE_CHART = {"snapshot.yaml"}
"""Files of the page whose kind the tests have no schema of."""

FLAGS = {
    "apply": {"--filename"},
    "create": {"--from-literal", "--from", "--docker-server", "--docker-username", "--docker-password"},
    "delete": set(),
    "describe": set(),
    "exec": {"--stdin"},
    "get": {"--output", "--selector", "--field-selector", "--sort-by"},
    "label": set(),
    "logs": {"--previous"},
    "port-forward": set(),
    "rollout": {"--timeout"},
    "scale": {"--replicas"},
    "wait": {"--for", "--timeout"},
}
"""Of kubectl: what it is asked to do, and how."""

pytestmark = pytest.mark.timeout(600)


class Api(threading.Thread):
    """The HTTP API on a socket, with a detector that needs no model, until it is stopped."""

    def __init__(self, redis: RedisSettings, tokens: Path, listening: socket.socket) -> None:
        super().__init__()
        self._redis = redis
        self._settings = ApiSettings(tokens_file=tokens)
        self._listening = listening
        self._server: uvicorn.Server | None = None

    def run(self) -> None:
        asyncio.run(self._answer())

    async def _answer(self) -> None:
        async def status() -> dict[str, object]:
            return {}

        async with Producer(self._redis) as producer:
            api = build_api(FakeDetector(), producer, status, self._settings, LimitSettings())
            self._server = uvicorn.Server(uvicorn.Config(api, log_config=None, lifespan="off"))
            await self._server.serve(sockets=[self._listening])

    def stop(self) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def ran(folder: Path) -> list[Ran]:
    """Run the page from its first command to its last, with a real stream server, worker and API."""
    work, pod = folder / "work", folder / "pod"
    work.mkdir()
    for name in ("data", "models", "tmp"):
        (pod / name).mkdir(parents=True)
    (work / "k8s").symlink_to(ROOT / "k8s")
    (work / "part.png").write_bytes(png(200, (64, 64)))
    write_category(work / "data" / "bottle")
    curl = shutil.which("curl")
    assert curl, "curl is missing on this machine"
    for name, text in FILES.items():
        (work / name).write_text(text)
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    for version in ("20261123-134500-1a2b3c4d", "20261124-080000-5e6f7a8b"):
        write_version(Registry(str(pod / "models")), "bottle", version, spec=spec)

    with EmbeddedServer() as server, socket.create_server(("127.0.0.1", 0)) as listening:
        environment = {
            "FLAWSTREAM_REDIS__URL": server.url,
            "FLAWSTREAM_REDIS__PASSWORD_FILE": str(folder / "password"),
            "FLAWSTREAM_REGISTRY__ROOT": str(pod / "models"),
            "FLAWSTREAM_DETECTOR__ENGINE": "torch",
            "OPERATOR_IMAGE": "operator:1.6.0",
            "PAGE_REDIS": str(server.port),
            "PAGE_API": str(listening.getsockname()[1]),
            "PAGE_CURL": curl,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }
        with session(folder, environment) as shell:
            found = []
            started: tuple[Api, subprocess.Popen[bytes]] | None = None
            for line in commands(PAGE):
                found.append(shell.run(line))
                if "create secret generic plant-tokens" in line:  # the last thing that the chart waits for
                    started = _start(server, folder, environment, listening)
            assert started is not None
            api, worker = started
            worker.terminate()
            worker.wait()
            api.stop()
    return found


def _start(
    server: EmbeddedServer, folder: Path, environment: dict[str, str], listening: socket.socket
) -> tuple[Api, subprocess.Popen[bytes]]:
    """Give server and API the Secrets that the page made, and start the worker."""
    password = json.loads((folder / "secret-plant-redis.json").read_text())["password"]
    (folder / "password").write_text(password)
    (folder / "tokens").write_text(json.loads((folder / "secret-plant-tokens.json").read_text())["tokens"])
    with RawRedis(server.port) as redis:
        redis("CONFIG", "SET", "requirepass", password)
    settings = RedisSettings(url=server.url, password_file=folder / "password")
    api = Api(settings, folder / "tokens", listening)
    api.start()
    variables = {**os.environ, **environment}
    return api, subprocess.Popen([sys.executable, "-m", "flawstream_cli", "worker"], env=variables, cwd=folder)


def test_every_command_ends_well(ran: list[Ran]) -> None:
    failed = [f"{one.line}\n{one.output}" for one in ran if one.code]
    assert not failed, "\n\n".join(failed)


def output_of(ran: list[Ran], part: str) -> str:
    """Give what the one line with this in it wrote."""
    (one,) = (one for one in ran if part in one.line)
    return one.output


def test_what_ran_gave_what_the_page_promises(ran: list[Ran]) -> None:
    assert "errors: 0" in output_of(ran, "datasets check")
    assert "20261123-134500-1a2b3c4d" in output_of(ran, "models list")
    assert json.loads(output_of(ran, "readyz"))
    assert json.loads(output_of(ran, "/v1/detect"))["verdict"] in {"normal", "anomalous"}
    assert json.loads(output_of(ran, "/v1/images"))["id"] == "first-2"
    assert re.search("normal|anomalous", output_of(ran, "flawstream push"))
    assert "bottle@20261123-134500-1a2b3c4d" in output_of(ran, "XREAD")
    assert output_of(ran, "sha256sum --check").count(": OK") == 5
    assert "ok" in output_of(ran, "flawstream doctor")


def test_links_of_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"(?m)^#+ (.+)$", PAGE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (ROOT / "docs" / target).exists(), target


def test_files_of_the_page_are_what_a_cluster_takes() -> None:
    for name, text in FILES.items():
        if name == "plant.yaml" or name in NOT_OF_THE_CHART:
            continue
        conformity.check(yaml.safe_load(text))


class Cluster:
    """What is there, as far as it is known from what was said to Helm and kubectl."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self.now: set[str] = set()
        self.ever: set[str] = set()
        self.own: set[str] = set()
        self.releases: set[str] = set()
        self.images: set[str] = set()

    def render(self, chart: str, flags: list[tuple[str, str]]) -> list[Body]:
        """Render as Helm would."""
        parts = [yaml.safe_load(self._read(value)) for name, value in flags if name == "--values"]
        values = merged(*parts, *(parse_set_string(value) for name, value in flags if name == "--set"))
        if chart == OURS:
            documents = render(values, Chart.load_archive((self._work / OURS).read_bytes()))
        else:
            assert chart == "k8s/flawstream", chart
            documents = render(values)
        for document in documents:
            conformity.check(document)
        links.check(documents, values)
        self._check_what_must_be_there(values)
        self.images |= {c["image"] for d in documents for pod in pods(d) for c in pod.containers}
        return documents

    def install(self, documents: list[Body]) -> None:
        """Have these objects, and those that KubeRay and Kubernetes make of them."""
        self.now = {owner(document).lower() for document in documents}
        for document in documents:
            name, kind = document["metadata"]["name"], document["kind"]
            if kind == "RayService":
                self.now |= {f"service/{name}-serve-svc", f"service/{name}-head-svc", "secret/line-flawstream-x7k2p"}
            if kind == "RayJob":
                self.now.add(f"job/{name}")
            if kind == "StatefulSet":
                claims = document["spec"].get("volumeClaimTemplates", [])
                self.now |= {f"persistentvolumeclaim/{c['metadata']['name']}-{name}-0" for c in claims}
        self.ever |= self.now

    def check(self, thing: str, *, of_table: bool) -> None:
        """See that an object is there."""
        assert thing.lower() in (self.ever if of_table else self.now) | self.own, f"{thing} is not there"

    def _read(self, name: str) -> str:
        if name in FILES:
            return FILES[name]
        path = self._work / name
        assert path.is_file(), f"{name} is neither in the chart nor on the page"
        return path.read_text()

    def _check_what_must_be_there(self, values: dict[str, Any]) -> None:
        """See that Secrets and claims which the values name were made on the page."""
        given = links.given(values)
        assert {thing.lower() for thing in given} <= self.own, f"{given} are named, and the page makes {self.own}"


def flags_of(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Part what is plain from flags, each with its value, which is the next word or stands behind `=`."""
    plain: list[str] = []
    flags: list[tuple[str, str]] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            plain.append(word)
        elif "=" in word:
            name, _, value = word.partition("=")
            flags.append((name, value))
        elif word in {"--stdin", "--previous", "--wait", "--logs", "--strict", "--create-namespace"}:
            flags.append((word, ""))
        else:
            flags.append((word, next(rest)))
    return plain, flags


def check_helm(words: list[str], cluster: Cluster) -> None:
    """Render what would be installed; hold the rest against what is."""
    plain, flags = flags_of(words)
    what, *rest = plain
    allowed = {"--namespace", "--create-namespace", "--values", "--set", "--version", "--wait", "--logs", "--strict"}
    assert {name for name, _ in flags} <= allowed, flags
    if what == "repo":
        assert rest == ["add", "kuberay", "https://ray-project.github.io/kuberay-helm/"]
        return
    if any(chart in rest for chart in OTHERS_CHARTS):
        assert what in {"install", "pull", "show"}
        return
    if what in {"install", "upgrade", "template"}:
        assert rest[0] == RELEASE
        assert dict(flags)["--namespace"] == NAMESPACE
        documents = cluster.render(rest[1], flags)
        if what != "template":
            cluster.install(documents)
            cluster.releases.add(rest[0])
    elif what == "lint":
        assert rest == ["k8s/flawstream"]
        report = lint(CHART, yaml.safe_load(FILES["plant.yaml"]), strict=True)
        assert not report["errors"]
    elif what == "package":
        assert rest == ["k8s/flawstream"]
    elif what == "show":
        assert rest == ["chart", "k8s/flawstream"]
    else:
        assert what in {"test", "history", "rollback", "uninstall"}
        assert rest[0] in cluster.releases
        assert dict(flags)["--namespace"] == NAMESPACE


def check_kubectl(words: list[str], cluster: Cluster, *, of_table: bool) -> None:  # noqa: C901, PLR0912 - a case for each
    """See that it names what is there."""
    end = words.index("--") if "--" in words else len(words)
    words, inner = words[:end], words[end + 1 :]
    plain, flags = flags_of(words)
    assert dict(flags).get("--namespace", NAMESPACE) == NAMESPACE
    what, *rest = plain
    assert {name for name, _ in flags} - {"--namespace"} <= FLAGS[what], words
    asked = dict(flags)
    match [what, *rest]:
        case ["create", "namespace", name] | ["delete", "namespace", name] | ["label", "namespace", name, _]:
            assert name == NAMESPACE
        case ["create", "secret", _, name]:
            cluster.own.add(f"secret/{name}")
        case ["create", "job", name]:
            cluster.check(asked["--from"], of_table=of_table)
            cluster.own.add(f"job/{name}")
        case ["apply"]:
            document = yaml.safe_load(FILES[asked["--filename"]])
            assert document["metadata"]["namespace"] == NAMESPACE
            cluster.own.add(owner(document).lower())
        case ["rollout", "status", thing] | ["scale", thing] | ["logs", thing] | ["wait", thing] | ["exec", thing]:
            cluster.check(thing, of_table=of_table)
        case ["port-forward", thing, ports]:
            cluster.check(thing, of_table=of_table)
            assert ports in {"6379:6379", "8000:8000", "8265:8265"}
        case ["get", kind]:
            assert kind in {"events", "networkpolicies", "persistentvolumeclaims", "pods"}
        case ["get" | "describe" | "delete", kind, *names]:
            for name in names:
                cluster.check(f"{kind}/{name}", of_table=of_table)
        case _:
            raise AssertionError(f"nobody knows kubectl {words}")
    if inner:
        assert what == "exec"
        if inner[0] == "flawstream":
            conformity.check_command(inner)
        else:
            assert inner[0] in {"sh", "tar"}, inner


def check_docker(words: list[str]) -> None:
    """See that files, targets and arguments are those of the Dockerfile."""
    plain, flags = flags_of(words)
    if plain[0] != "build":
        assert plain[0] in {"pull", "push", "save", "load", "tag"}
        return
    assert plain[1:] == ["."]
    asked = dict(flags)
    text = (ROOT / asked["--file"]).read_text()
    assert f" AS {asked['--target']}\n" in text
    for name, value in flags:
        if name == "--build-arg":
            assert f"ARG {value.partition('=')[0]}=" in text
    assert set(asked) <= {"--file", "--target", "--tag", "--build-arg"}


def test_what_needs_a_cluster_names_what_the_chart_makes(ran: list[Ran], folder: Path) -> None:
    cluster = Cluster(folder / "work")
    in_blocks = len(commands(re.sub(r"(?m)^\|.*$", "", PAGE)))
    pushed = set()
    for number, one in enumerate(ran):
        for program, *words in one.calls:
            try:
                match program:
                    case "helm":
                        check_helm(words, cluster)
                    case "kubectl":
                        check_kubectl(words, cluster, of_table=number >= in_blocks)
                    case "docker":
                        check_docker(words)
                        pushed |= {words[1]} if words[0] == "push" else set()
            except Exception as error:
                raise AssertionError(f"{one.line}: {error}") from error
    ours = {image for image in pushed if "kuberay-operator" not in image}
    assert {image.partition(":")[0].rpartition("/")[2] for image in ours} == {"flawstream", "valkey"}
    assert ours <= cluster.images, f"pushed, and no pod runs it: {ours - cluster.images}"


def test_streams_start_from_a_copy_of_their_volume(tmp_path: Path) -> None:
    first, copy = tmp_path / "first", tmp_path / "copy"
    with EmbeddedServer(first) as server, RawRedis(server.port) as redis:
        for number in range(50):
            redis("XADD", "flawstream:images", "*", "id", number, "category", "bottle", "image", png(number))
        shutil.copytree(first, copy, ignore=shutil.ignore_patterns("*.lock"))  # while it runs, as a snapshot would
    with EmbeddedServer(copy) as server, RawRedis(server.port) as redis:
        assert redis.count("XLEN", "flawstream:images") == 50
