"""What every pod of the chart gets from its values."""

from typing import Any

import pytest
from helm_python import HelmError
from helpers.chart.combinations import container
from helpers.chart.rendered import Pod, merged, pods, profile, render

EVERYTHING = merged(
    profile("gpu"),
    {
        "workers": {"enabled": True},
        "toolbox": {"enabled": True},
        "training": {"enabled": True, "data": {"existingClaim": "photographs"}},
    },
)
PLACES = {
    "ray-head": "ray.head",
    "train-head": "ray.head",
    "gcs-redis": "ray.head",
    "redis": "redis.bundled",
    "worker": "workers",
    "toolbox": "toolbox",
    "train-worker": "training",
    "train-submit": "training",
    "train": "training",
}
"""Component of a pod -> whose `pod` it takes, besides Ray's workers, of which there are two groups, and the test."""
MORE: dict[str, Any] = {
    "labels": {"plant": "north"},
    "annotations": {"backup": "no"},
    "runtimeClassName": "gvisor",
    "volumes": [{"name": "scratch", "emptyDir": {}}],
    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    "initContainers": [container("before")],
    "sidecars": [container("beside")],
}


def all_pods(*values: dict[str, Any]) -> list[Pod]:
    """Give the pods of a release with everything in it, with its training in both ways."""
    whole = merged(EVERYTHING, *values)
    plain = merged(whole, {"training": {"kind": "CronJob"}})
    return [pod for one in (whole, plain) for document in render(one) for pod in pods(document)]


def component(pod: Pod) -> str:
    """Give what kind of pod it is."""
    return pod.labels["app.kubernetes.io/component"]


def check_more(pod: Pod) -> None:
    """See that a pod has all of `MORE`."""
    assert pod.labels["plant"] == "north", pod.owner
    assert pod.annotations["backup"] == "no", pod.owner
    assert pod.spec["runtimeClassName"] == "gvisor", pod.owner
    assert pod.spec["volumes"].count(MORE["volumes"][0]) == 1, pod.owner
    assert pod.spec["containers"][0]["volumeMounts"].count(MORE["volumeMounts"][0]) == 1, pod.owner
    assert pod.spec["initContainers"] == MORE["initContainers"], pod.owner
    ends = component(pod) in {"train", "train-submit", "test"}
    assert ("beside" in {one["name"] for one in pod.spec["containers"]}) is not ends, pod.owner
    assert pod.spec["containers"][0]["name"] != "beside", "KubeRay starts Ray in the first"


def test_every_pod_gets_what_is_for_all() -> None:
    found = all_pods({"pod": MORE})
    assert {component(pod) for pod in found} == {*PLACES, "ray-worker", "test"}
    for pod in found:
        check_more(pod)


@pytest.mark.parametrize("place", sorted({*PLACES.values(), "serve.cpuWorkers", "serve.gpuWorkers"}))
def test_kind_of_pod_gets_what_is_for_it_alone(place: str) -> None:
    values: dict[str, Any] = {"pod": MORE}
    for name in reversed(place.split(".")):
        values = {name: values}
    for pod in all_pods(values):
        group = {"cpu": "serve.cpuWorkers", "gpu": "serve.gpuWorkers"}.get(pod.labels.get("ray.io/group", ""))
        if place == (group or PLACES.get(component(pod))):
            check_more(pod)
        else:
            assert "plant" not in pod.labels
            assert "runtimeClassName" not in pod.spec


def test_both_apply_to_a_pod_and_its_own_wins() -> None:
    every = {"labels": {"plant": "north", "hall": "1"}, "sidecars": [container("logs")]}
    own = {"labels": {"hall": "2"}, "sidecars": [container("audit")]}
    found = all_pods({"pod": every, "toolbox": {"pod": own}})
    pod = next(pod for pod in found if component(pod) == "toolbox")
    assert pod.labels.items() >= {"plant": "north", "hall": "2"}.items()
    assert [one["name"] for one in pod.spec["containers"]] == ["toolbox", "logs", "audit"]


def test_openshift_sets_user_and_groups() -> None:
    for pod in all_pods({"podSecurity": {"runAsUser": None, "fsGroup": None}}):
        assert set(pod.spec["securityContext"]) == {"runAsNonRoot", "seccompProfile"}, pod.owner


@pytest.mark.parametrize("place", ["commonLabels", "pod.labels", "workers.pod.labels", "redis.bundled.pod.labels"])
@pytest.mark.parametrize("name", ["app.kubernetes.io/component", "app.kubernetes.io/instance", "ray.io/group"])
def test_labels_that_select_pods_cannot_be_changed(place: str, name: str) -> None:
    values: dict[str, Any] = {name: "x"}
    for part in reversed(place.split(".")):
        values = {part: values}
    with pytest.raises(HelmError, match=rf"{place}: the label {name} is set by"):
        render(merged({"workers": {"enabled": True}}, values))


def test_pods_of_one_kind_are_spread_over_zones_and_nodes() -> None:
    """Apart from those that they replace, which are there for a while too."""
    keys = {"ray-worker": "ray.io/cluster", "worker": "pod-template-hash"}
    found = [pod for pod in all_pods() if component(pod) in keys]
    for pod in found:
        spread = pod.spec["topologySpreadConstraints"]
        assert [one["topologyKey"] for one in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
        assert all(one["matchLabelKeys"] == [keys[component(pod)]] for one in spread)
    assert {component(pod) for pod in found} == set(keys)
