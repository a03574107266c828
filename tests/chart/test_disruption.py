"""Node drains: they end, and leave enough pods running."""

from typing import Any

import pytest
from helpers.chart.rendered import Body, merged, profile, render

THREE: dict[str, Any] = {
    "serve": {"cpuWorkers": {"replicas": 3}},
    "settings": {"worker": {"replicas": 3}},
}


def budgets(values: dict[str, Any]) -> dict[str, Body]:
    """Return the specs of the PodDisruptionBudgets by name."""
    return {d["metadata"]["name"]: d["spec"] for d in render(values) if d["kind"] == "PodDisruptionBudget"}


def test_budgets_of_ray_s_pods_are_whole_numbers_of_available_pods() -> None:
    """Without a scale subresource Kubernetes knows no number of pods to subtract `maxUnavailable` from."""
    everything = merged(THREE, profile("gpu"), {"podDisruptionBudget": {"protectSingletons": True}})
    for name, spec in budgets(everything).items():
        if "ray" in name:
            assert isinstance(spec["minAvailable"], int), name
            assert "maxUnavailable" not in spec, name


def test_all_ray_workers_but_one_stay_available() -> None:
    spec = budgets(THREE)["line-flawstream-ray-worker-cpu"]
    assert spec["minAvailable"] == 2
    assert spec["selector"]["matchLabels"]["ray.io/group"] == "cpu"


def test_one_ray_worker_may_always_be_evicted() -> None:
    assert not [name for name in budgets({}) if "ray" in name]
    assert not [name for name in budgets(profile("gpu")) if "ray" in name]


def test_pods_that_never_get_a_replica_are_not_counted_on() -> None:
    """Without a replica a pod is never ready: a budget that asks for it would stop every drain."""
    idle = {"serve": {"cpuWorkers": {"replicas": 3}}, "settings": {"worker": {"replicas": 2}}}
    assert budgets(idle)["line-flawstream-ray-worker-cpu"]["minAvailable"] == 1


def test_autoscaled_group_keeps_its_fewest_pods_but_one() -> None:
    scaled = merged(
        profile("gpu"), {"serve": {"gpuWorkers": {"minReplicas": 3}}, "settings": {"detector": {"replicas": 3}}}
    )
    assert budgets(scaled)["line-flawstream-ray-worker-gpu"]["minAvailable"] == 2


@pytest.mark.parametrize("more", [{}, {"podDisruptionBudget": {"protectSingletons": True}}])
def test_unready_pods_never_stop_a_drain(more: dict[str, Any]) -> None:
    found = budgets(merged(THREE, {"workers": {"enabled": True}}, more))
    assert found
    assert {spec.get("unhealthyPodEvictionPolicy") for spec in found.values()} == {"AlwaysAllow"}


def test_protected_head_is_not_evicted_during_an_upgrade_either() -> None:
    """There are two heads then."""
    found = budgets({"podDisruptionBudget": {"protectSingletons": True}})
    assert found["line-flawstream-ray-head"]["minAvailable"] == 2
    assert found["line-flawstream-redis"]["minAvailable"] == 1
