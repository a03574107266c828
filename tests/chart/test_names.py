"""Names of objects for every name that Helm lets a release have: none is longer than Kubernetes or KubeRay takes."""

import re
from typing import Any

import pytest
from helm_python import HelmError
from helpers.chart.combinations import AXES
from helpers.chart.rendered import Body, merged, profile, render

DNS_1035 = re.compile("[a-z]([a-z0-9-]*[a-z0-9])?")
LONGEST = {
    "RayService": 47,  # KubeRay's validation.go, and of RayCronJobs since 1.7: it appends to these names
    "RayJob": 47,
    "RayCronJob": 36,
    "CronJob": 52,  # Kubernetes appends the time to a job's name
    "StatefulSet": 52,  # a hash of ten characters in a label of its pods
    "Deployment": 46,  # two hashes in a pod's name
}
EVERYTHING = merged(
    profile("gpu"),
    {
        "workers": {"enabled": True},
        "toolbox": {"enabled": True},
        "training": {"enabled": True, "run": "a23456789012", "data": {"existingClaim": "photographs"}},
        "podDisruptionBudget": {"protectSingletons": True},
    },
    AXES["monitoring"]["PodMonitor"],
)


def check(document: Body) -> None:
    """Check the length and the letters of a document's name."""
    name, kind = document["metadata"]["name"], document["kind"]
    assert DNS_1035.fullmatch(name), name
    assert len(name) <= LONGEST.get(kind, 63), f"{kind} {name}"
    assert len(name) + len("-serve-svc") <= 63


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob", "CronJob"])
@pytest.mark.parametrize(
    "release",
    ["x", "flawstream", "line-7.hall-2", "l" * 53, "a-" * 26 + "a", "line." + "9" * 48, "quality-of-the-northern-pl-7"],
)
def test_every_release_has_names_that_kuberay_takes(release: str, kind: str) -> None:
    documents = render(merged(EVERYTHING, {"training": {"kind": kind}}), release=release)
    assert len(documents) > 20
    for document in documents:
        check(document)


def test_name_does_not_change_when_training_is_turned_on() -> None:
    names = [
        {d["metadata"]["name"] for d in render(values, release="l" * 53) if d["kind"] == "RayService"}
        for values in ({}, EVERYTHING)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("release", "values"),
    [("7th-line", {}), ("line", {"nameOverride": "Flaws"}), ("line", {"nameOverride": "flaw_stream"})],
)
def test_name_that_no_service_may_have_is_refused_with_the_reason(release: str, values: dict[str, Any]) -> None:
    with pytest.raises(HelmError, match=r"DNS-1035.*fullnameOverride"):
        render(values, release=release)


def test_own_name_is_as_long_as_its_longest_child_allows() -> None:
    for document in render(merged(EVERYTHING, {"fullnameOverride": "f" * 28})):
        check(document)
    with pytest.raises(HelmError, match="fullnameOverride"):
        render({"fullnameOverride": "f" * 29})
