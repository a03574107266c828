"""What the chart asks of Ray, group by group."""

from collections.abc import Iterator
from typing import Any

import pytest
from helm_python import HelmError
from helpers.chart.conformity import serve_settings
from helpers.chart.rendered import Body, merged, profile, render
from ray._private.ray_constants import OBJECT_STORE_MINIMUM_MEMORY_BYTES
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.dashboard.consts import DASHBOARD_METRIC_PORT

from schemas.settings import Settings

TRAINING = {"training": {"enabled": True, "data": {"existingClaim": "photographs"}}}
PROFILES: dict[str, dict[str, Any]] = {
    "default": TRAINING,
    "gpu": merged(profile("gpu"), TRAINING),
    "little shared memory": merged(TRAINING, {"ray": {"sharedMemory": "100M"}}),
    "scheduled": merged(TRAINING, {"training": {"kind": "RayCronJob"}}),
}
_UNITS = {"Mi": 1024**2, "Gi": 1024**3, "M": 10**6}


def groups(values: dict[str, Any]) -> Iterator[tuple[str, Body]]:
    """Give every group of Ray pods with its name."""
    for document in render(values):
        match document["kind"]:
            case "RayService":
                cluster = document["spec"]["rayClusterConfig"]
            case "RayJob":
                cluster = document["spec"]["rayClusterSpec"]
            case "RayCronJob":
                cluster = document["spec"]["jobTemplate"]["rayClusterSpec"]
            case _:
                continue
        yield f"{document['kind']} head", cluster["headGroupSpec"]
        yield from ((f"{document['kind']} {group['groupName']}", group) for group in cluster["workerGroupSpecs"])


def shared_memory_bytes(group: Body) -> int:
    """Give the size of a group's /dev/shm."""
    (volume,) = (v for v in group["template"]["spec"]["volumes"] if v["name"] == "shared-mem")
    size = volume["emptyDir"]["sizeLimit"]
    (unit,) = (unit for unit in _UNITS if size.endswith(unit))
    return int(size.removesuffix(unit)) * _UNITS[unit]


@pytest.mark.parametrize("name", PROFILES)
def test_object_store_fits_into_shared_memory(name: str) -> None:
    found = dict(groups(PROFILES[name]))
    assert len(found) >= 4
    for whose, group in found.items():
        size = int(group["rayStartParams"]["object-store-memory"])
        assert OBJECT_STORE_MINIMUM_MEMORY_BYTES <= size < shared_memory_bytes(group), whose


@pytest.mark.parametrize(
    ("size", "said"),
    [("64Mi", r"ray\.sharedMemory=64Mi is too small"), ("6Gi", r"ray\.head\.resources\.limits\.memory=6Gi")],
)
def test_shared_memory_that_ray_cannot_use_is_refused(size: str, said: str) -> None:
    with pytest.raises(HelmError, match=said):
        render({"ray": {"sharedMemory": size}})


def test_head_gets_no_request_and_runs_no_replica() -> None:
    """Else a head that restarts takes the HTTP API with it, in spite of Ray's state elsewhere."""
    (service,) = (d for d in render({}) if d["kind"] == "RayService")
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    assert service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    settings = Settings.model_validate(serve_settings(service))
    assert min(part.num_cpus for part in (settings.api, settings.worker, settings.detector)) > 0


@pytest.mark.parametrize("part", ["api", "worker", "detector"])
def test_replicas_that_could_land_on_the_head_are_refused(part: str) -> None:
    with pytest.raises(HelmError, match=rf"settings\.{part}\.num_cpus"):
        render({"settings": {part: {"num_cpus": 0}}})


@pytest.mark.parametrize("resource", ["nvidia.com/gpu", "nvidia.com/mig-1g.10gb", "gpu.intel.com/i915", "amd.com/gpu"])
def test_ray_knows_the_gpus_of_every_group_whatever_their_resource_is_called(resource: str) -> None:
    values = {
        "serve": {"gpuWorkers": {"gpus": 2, "resourceName": resource}},
        "training": {"gpus": 3, "gpuResourceName": resource},
    }
    found = dict(groups(merged(profile("gpu"), TRAINING, values)))
    assert {name: group["rayStartParams"]["num-gpus"] for name, group in found.items()} == {
        "RayService head": "0",
        "RayService cpu": "0",
        "RayService gpu": "2",
        "RayJob head": "0",
        "RayJob train": "3",
    }
    limits = found["RayService gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits[resource] == "2"


@pytest.mark.parametrize("drain_s", [5, 20, 44.5, 300])
def test_pods_of_the_service_have_time_to_drain(drain_s: float) -> None:
    for name, group in groups(merged(TRAINING, {"settings": {"worker": {"drain_s": drain_s}}})):
        spec = group["template"]["spec"]
        environment = {item["name"]: item.get("value") for item in spec["containers"][0]["env"]}
        drains_s = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert spec["terminationGracePeriodSeconds"] > drains_s >= 30, name
        assert name.startswith("RayJob") or drains_s > drain_s, name


@pytest.mark.parametrize("timeout_s", [1, 90, 600])
def test_old_cluster_stays_until_its_requests_are_answered(timeout_s: int) -> None:
    (service,) = (d for d in render({"api": {"requestTimeoutSeconds": timeout_s}}) if d["kind"] == "RayService")
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > timeout_s
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= 60  # KubeRay's default


STEPS: dict[str, Any] = {
    "ray": {
        "upgradeStrategy": "NewClusterWithIncrementalUpgrade",
        "incrementalUpgrade": {"gatewayClassName": "istio"},
        "autoscaling": {"enabled": True},
    }
}


def test_upgrade_may_move_requests_step_by_step() -> None:
    (service,) = (d for d in render(STEPS) if d["kind"] == "RayService")
    assert service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"] == {
        "gatewayClassName": "istio",
        "stepSizePercent": 20,
        "intervalSeconds": 60,
        "maxSurgePercent": 100,
    }
    (service,) = (d for d in render({}) if d["kind"] == "RayService")
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"autoscaling": {"enabled": False}}, r"ray\.autoscaling\.enabled"),
        ({"incrementalUpgrade": {"gatewayClassName": ""}}, "gatewayClassName"),
        ({"incrementalUpgrade": {"maxSurgePercent": 10}}, r"stepSizePercent=20 is more than maxSurgePercent=10"),
    ],
)
def test_upgrade_in_steps_that_kuberay_would_refuse_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(HelmError, match=said):
        render(merged(STEPS, {"ray": values}))


def test_metrics_of_the_head_s_own_processes_are_scraped() -> None:
    """Those of the dashboard and of the autoscaler have ports of their own."""
    values = {"ray": {"autoscaling": {"enabled": True}}, "monitoring": {"monitor": "PodMonitor"}}
    documents = render(values)
    head = dict(groups(values))["RayService head"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports["dash-metrics"] == DASHBOARD_METRIC_PORT
    assert ports["as-metrics"] == AUTOSCALER_METRIC_PORT
    (monitor,) = (d["spec"] for d in documents if d["kind"] == "PodMonitor")
    assert {one["port"] for one in monitor["podMetricsEndpoints"]} == {"metrics", "dash-metrics", "as-metrics"}
    (policy,) = (
        d["spec"] for d in documents if d["metadata"]["name"] == "line-flawstream-ray" and "ingress" in d["spec"]
    )
    opened = {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])}
    assert opened >= {8080, DASHBOARD_METRIC_PORT, AUTOSCALER_METRIC_PORT}


def test_ray_s_state_may_be_behind_tls_and_a_user() -> None:
    state = {"address": "rediss://ray-redis:6379", "username": "ray", "caSecret": "authority"}
    values = {"ray": {"gcsFaultTolerance": {"enabled": True, "mode": "external", **state}}}
    (service,) = (d for d in render(values) if d["kind"] == "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"] == {
        "redisAddress": "rediss://ray-redis:6379",
        "redisUsername": {"value": "ray"},
    }
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (path,) = (item["value"] for item in head["env"] if item["name"] == "RAY_REDIS_CA_CERT")
    (mount,) = (mount for mount in head["volumeMounts"] if mount["name"] == "ray-state-ca")
    assert path == f"{mount['mountPath']}/ca.crt"
