"""The chart put through the real Helm engine: its documents, and every pod that would come of them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from helm_python import Chart

from helpers.places import ROOT

CHART = ROOT / "k8s" / "flawstream"
RELEASE = "line"
NAMESPACE = "plant"

_BETWEEN = re.compile(r"(?m)^---\s*$")
_PASSWORD = re.compile(r"(?m)^(  \S+: )[A-Za-z0-9+/=]{40,}$")
_KUBERAY = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}

Body = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod that would come of a document.

    Attributes:
        owner: Kind and name of the document.
        role: What kind of pod: `ray-head`, `ray-worker`, `job` or `service`.
        labels: Its labels, those of KubeRay included.
        annotations: Its annotations.
        spec: As Kubernetes has it.
    """

    owner: str
    role: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    spec: Body

    @property
    def containers(self) -> list[Body]:
        """Give all containers, those that run first included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@cache
def chart() -> Chart:
    """Load the chart once."""
    return Chart.load(CHART)


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Lay values over one another, as Helm does with several files."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            below = whole.get(name)
            whole[name] = merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return whole


def profile(name: str) -> dict[str, Any]:
    """Read one of the chart's own sets of values."""
    found: dict[str, Any] = yaml.safe_load((CHART / f"values-{name}.yaml").read_text())
    return found


@cache
def parse(text: str) -> Body | None:
    """Read a document; the same text gives the same object, which nobody may change."""
    body: Body | None = yaml.load(text, yaml.CSafeLoader)
    return body


def render(values: Mapping[str, Any], of: Chart | None = None, release: str = RELEASE) -> list[Body]:
    """Give the documents of a release; random passwords are made equal.

    Args:
        values: Over the chart's own.
        of: Another chart than the one in the folder.
        release: Its name.

    Raises:
        HelmError: The values are refused.
    """
    documents = []
    for path, text in (of or chart()).render(dict(values), name=release, namespace=NAMESPACE).items():
        if path.endswith("NOTES.txt"):
            continue
        for part in _BETWEEN.split(text):
            body = parse(_PASSWORD.sub(r"\1cGFzc3dvcmQ=", part) if "kind: Secret" in part else part)
            if body is not None:
                documents.append(body)
    return documents


def notes(values: Mapping[str, Any]) -> str:
    """Give what Helm says once the release is there."""
    found = chart().render(dict(values), name=RELEASE, namespace=NAMESPACE)
    return next(text for path, text in found.items() if path.endswith("NOTES.txt"))


def owner(document: Body) -> str:
    """Name a document."""
    return f"{document['kind']}/{document['metadata']['name']}"


def pods(document: Body) -> Iterator[Pod]:
    """Find the pods that would come of a document."""
    spec = document.get("spec", {})
    match document["kind"]:
        case "Pod":
            yield _pod(document, "job", document)
        case "Deployment" | "StatefulSet":
            yield _pod(document, "service", spec["template"])
        case "CronJob":
            yield _pod(document, "job", spec["jobTemplate"]["spec"]["template"])
        case "RayService":
            yield from _ray_pods(document, spec["rayClusterConfig"])
        case "RayJob":
            yield from _job_pods(document, spec)
        case "RayCronJob":
            yield from _job_pods(document, spec["jobTemplate"])


def _job_pods(document: Body, job: Body) -> Iterator[Pod]:
    yield _pod(document, "job", job["submitterPodTemplate"])
    yield from _ray_pods(document, job["rayClusterSpec"])


def _ray_pods(document: Body, cluster: Body) -> Iterator[Pod]:
    head = {"ray.io/node-type": "head", "ray.io/group": "headgroup"}
    yield _pod(document, "ray-head", cluster["headGroupSpec"]["template"], head)
    for group in cluster["workerGroupSpecs"]:
        worker = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}
        yield _pod(document, "ray-worker", group["template"], worker)


def _pod(document: Body, role: str, template: Body, of_kuberay: Mapping[str, str] | None = None) -> Pod:
    metadata = template.get("metadata", {})
    labels = dict(metadata.get("labels", {}))
    if of_kuberay is not None:
        labels |= _KUBERAY | {"ray.io/is-ray-node": "yes", "ray.io/cluster": "x"} | dict(of_kuberay)
    return Pod(owner(document), role, labels, metadata.get("annotations", {}), template["spec"])
