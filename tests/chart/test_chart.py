"""The chart as users choose it: its profiles and each single choice, checked in all ways; bad values refused."""

import copy
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python import HelmError, lint
from helpers.chart import conformity, links
from helpers.chart.combinations import AXES
from helpers.chart.node import ENDS
from helpers.chart.rendered import CHART, merged, notes, owner, pods, profile, render

from k8s.reference import SCHEMA, TABLE, make_schema, make_table

PROFILES: dict[str, dict[str, Any]] = {
    "default": {},
    **{name: profile(name) for name in ("small", "gpu", "airgapped")},
    "gpu, airgapped": merged(profile("gpu"), profile("airgapped")),
    "small, airgapped": merged(profile("small"), profile("airgapped")),
}
CHOICES = [(axis, choice) for axis, ways in AXES.items() for choice in ways]


@pytest.mark.parametrize("name", PROFILES)
def test_profile_is_what_a_cluster_takes(name: str) -> None:
    documents = render(PROFILES[name])
    for document in documents:
        conformity.check(document)
    links.check(documents, PROFILES[name])


@pytest.mark.parametrize("name", PROFILES)
def test_profile_passes_helm_s_own_strict_lint(name: str) -> None:
    report = lint(CHART, PROFILES[name], strict=True)
    assert not report["errors"]
    assert [said for said in report["messages"] if said["severity"] > 1] == []


@pytest.mark.parametrize(("axis", "choice"), CHOICES, ids=[f"{axis}: {choice}" for axis, choice in CHOICES])
def test_choice_is_what_a_cluster_takes(axis: str, choice: str) -> None:
    values = AXES[axis][choice]
    documents = render(values)
    for document in documents:
        conformity.check(document)
    links.check(documents, values)


@pytest.mark.parametrize(("axis", "choice"), CHOICES, ids=[f"{axis}: {choice}" for axis, choice in CHOICES])
def test_notes_name_what_is_there(axis: str, choice: str) -> None:
    values = AXES[axis][choice]
    documents = render(values)
    there = {owner(document).lower() for document in documents} | {each.lower() for each in links.given(values)}
    there |= {f"service/{d['metadata']['name']}{end}" for d in documents if d["kind"] == "RayService" for end in ENDS}
    said = notes(values)
    named = re.findall(r"(service|rayservice)/([a-z0-9.-]+)", said) + re.findall(r"get (\w+) ([a-z0-9.-]+)", said)
    assert named
    assert {f"{kind}/{name}" for kind, name in named} <= there


def test_airgapped_plant_asks_its_own_registry_alone() -> None:
    host, _, _ = profile("airgapped")["image"]["repository"].partition("/")
    for document in render(PROFILES["gpu, airgapped"]):
        for pod in pods(document):
            assert all(container["image"].startswith(f"{host}/") for container in pod.containers)


def test_listed_images_are_those_of_the_pods() -> None:
    metadata = yaml.safe_load((CHART / "Chart.yaml").read_text())
    listed = {one["image"] for one in yaml.safe_load(metadata["annotations"]["artifacthub.io/images"])}
    documents = render(merged(profile("gpu"), {"workers": {"enabled": True}, "training": TRAINING}))
    assert {c["image"] for document in documents for pod in pods(document) for c in pod.containers} == listed


def test_schema_and_table_are_what_the_values_say() -> None:
    assert SCHEMA.read_text() == make_schema()
    assert TABLE.read_text() == make_table()


def test_validators_are_as_strict_as_the_library_s_own() -> None:
    (worker,) = (d for d in render(PROFILES["small"]) if d["kind"] == "Deployment")
    kubernetes_validate.validate(worker, conformity.VERSIONS[0], strict=True)
    conformity.check(worker)
    worker = copy.deepcopy(worker)
    worker["spec"]["template"]["spec"]["containers"][0]["ports"][0]["prot"] = "TCP"
    with pytest.raises(jsonschema.ValidationError, match="prot"):
        kubernetes_validate.validate(worker, conformity.VERSIONS[0], strict=True)
    with pytest.raises(jsonschema.ValidationError, match="prot"):
        conformity.check(worker)


TRAINING = {"enabled": True, "data": {"existingClaim": "photographs"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a typo at the top": ({"sevre": {"enabled": True}}, "sevre"),
    "a typo below": ({"serve": {"enable": True}}, "enable"),
    "a typo in a setting": ({"settings": {"worker": {"batch_sise": 8}}}, "batch_sise"),
    "a setting out of range": ({"settings": {"worker": {"batch_size": 0}}}, "batch_size"),
    "a setting that the chart writes": ({"settings": {"redis": {"url": "redis://x:6379/0"}}}, "url"),
    "a word that is none of the choices": ({"redis": {"mode": "internal"}}, "mode"),
    "text for a number": ({"redis": {"bundled": {"memoryMi": "lots"}}}, "memoryMi"),
    "too little memory": ({"redis": {"bundled": {"memoryMi": 16}}}, "memoryMi"),
    "no quantity": ({"registry": {"volume": {"size": "twenty"}}}, "size"),
    "a password in a URL": (
        {"redis": {"mode": "external", "external": {"url": "redis://me:secret@host:6379"}}},
        "url",
    ),
    "an external server without address": ({"redis": {"mode": "external"}}, "url"),
    "a bucket without address": ({"registry": {"type": "s3"}}, "url"),
    "a cluster with Sentinels": (
        {"redis": {"mode": "external", "external": {"url": "redis://h:1", "cluster": True, "sentinels": ["s:1"]}}},
        "sentinels",
    ),
    "a cluster without shards": (
        {"redis": {"mode": "external", "external": {"url": "redis://h:1", "cluster": True}}},
        "settings.redis.shards",
    ),
    "training without data": ({"training": {"enabled": True}}, "existingClaim"),
    "a shell's command in training": ({"training": {**TRAINING, "arguments": ["; reboot"]}}, "arguments"),
    "nothing that judges": ({"serve": {"enabled": False}}, "serve|workers|anyOf"),
    "GPU pods for nobody": ({"serve": {"gpuWorkers": {"enabled": True}}}, "no detector requires one"),
    "a GPU that no pod has": ({"settings": {"detector": {"num_gpus": 1}}}, "no pod has one"),
    "more CPUs than a pod has": ({"settings": {"detector": {"num_cpus": 64}}}, "no replica can start"),
    "scaling between bounds that cross": (
        {"workers": {"enabled": True, "keda": {"enabled": True, "minReplicas": 9, "maxReplicas": 2}}},
        "minReplicas=9",
    ),
    "more pods than the most": (
        {"ray": {"autoscaling": {"enabled": True}}, "serve": {"cpuWorkers": {"replicas": 9}}},
        "replicas=9",
    ),
    "a limit below the request": (
        {"toolbox": {"enabled": True, "resources": {"requests": {"memory": "8Gi"}}}},
        r"toolbox\.resources: the limit of memory is 4Gi, and less than the request, 8Gi",
    ),
    "a limit of millicores below the request": (
        {"ray": {"head": {"resources": {"limits": {"cpu": "900m"}}}}},
        r"ray\.head\.resources: the limit of cpu is 900m",
    ),
    "a sidecar of no pod": ({"pod": {"containers": []}}, "containers"),
    "scaling from nothing": ({"settings": {"worker": {"replicas": 0, "max_replicas": 4}}}, "max_replicas"),
    "Ingress without host": ({"ingress": {"enabled": True}}, "host"),
    "HTTPRoute without Gateway": ({"httpRoute": {"enabled": True}}, "parentRefs"),
    "half a digest": ({"image": {"digest": "sha256:abc"}}, "digest"),
    "an account that is not named": ({"serviceAccount": {"create": False}}, "name"),
    "Ray's state at no address": ({"ray": {"gcsFaultTolerance": {"enabled": True, "mode": "external"}}}, "address"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values_are_refused_by_name(case: str) -> None:
    values, said = REFUSED[case]
    with pytest.raises(HelmError) as refused:
        render(values)
    assert re.search(said, str(refused.value)), str(refused.value)
