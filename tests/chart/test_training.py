"""Training jobs beside the cluster's other work: queues, priorities, schedules."""

from typing import Any

import pytest
from helm_python import HelmError
from helpers.chart.rendered import Body, merged, pods, render

ON: dict[str, Any] = {"training": {"enabled": True, "data": {"existingClaim": "photographs"}}}
QUEUED: dict[str, Any] = {"training": {"queue": "nights", "queuePriority": "low"}}
LABELS = {"kueue.x-k8s.io/queue-name": "nights", "kueue.x-k8s.io/priority-class": "low"}
KINDS = ["RayJob", "RayCronJob", "CronJob"]


def job(kind: str, *values: dict[str, Any]) -> Body:
    """Give the one document of a kind."""
    (document,) = (d for d in render(merged(ON, {"training": {"kind": kind}}, *values)) if d["kind"] == kind)
    return document


def test_queue_takes_the_jobs() -> None:
    assert job("RayJob", QUEUED)["metadata"]["labels"].items() >= LABELS.items()
    assert job("CronJob", QUEUED)["spec"]["jobTemplate"]["metadata"]["labels"] == LABELS
    assert not [name for name in job("RayJob")["metadata"]["labels"] if "kueue" in name]


def test_queue_that_would_get_no_job_is_refused() -> None:
    with pytest.raises(HelmError, match=r"training\.queue needs training\.kind RayJob or CronJob"):
        job("RayCronJob", QUEUED)
    with pytest.raises(HelmError, match=r"training\.queuePriority needs training\.queue"):
        job("RayJob", {"training": {"queuePriority": "low"}})


@pytest.mark.parametrize("kind", KINDS)
def test_training_may_be_suspended(kind: str) -> None:
    assert job(kind, {"training": {"suspend": True}})["spec"]["suspend"] is True
    assert "suspend" not in job(kind)["spec"], "Kueue sets it: an upgrade must leave it"


@pytest.mark.parametrize("kind", ["RayCronJob", "CronJob"])
def test_schedule_has_a_time_zone(kind: str) -> None:
    assert job(kind, {"training": {"timeZone": "Europe/Zurich"}})["spec"]["timeZone"] == "Europe/Zurich"
    assert "timeZone" not in job(kind)["spec"], "KubeRay 1.6 does not know it"


@pytest.mark.parametrize("kind", KINDS)
def test_training_pods_have_a_priority_of_their_own(kind: str) -> None:
    values = {"priorityClassName": "plant", "training": {"priorityClassName": "batch"}}
    for pod in pods(job(kind, values)):
        assert pod.spec["priorityClassName"] == "batch"
    for document in render(merged(ON, {"training": {"kind": kind}}, values)):
        for pod in pods(document):
            ours = pod.labels["app.kubernetes.io/component"].startswith("train")
            assert pod.spec["priorityClassName"] == ("batch" if ours else "plant")
