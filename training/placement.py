"""What a trainer needs of a node, and what the nodes of the joined Ray cluster have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from schemas.errors import ConfigError
from schemas.manifest import Device
from schemas.settings import TrainingSettings

_GB = 1_000_000_000
_MAX_NODES_LISTED = 8


@dataclass(frozen=True, slots=True)
class Node:
    """A live node of the cluster.

    Attributes:
        id: Ray's id.
        name: Its host name and address.
        address: (host, port) at which its raylet accepts connections.
        resources: All that it has, by Ray's names: `CPU`, `GPU`, and `memory` in bytes.
        labels: Its Ray labels.
    """

    id: str
    name: str
    address: tuple[str, int]
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def summary(self) -> str:
        """Describe what it has in words."""
        has = (
            f"{self.name}: {self.resources.get('CPU', 0):g} CPUs, {self.resources.get('GPU', 0):g} GPUs, "
            f"{self.resources.get('memory', 0) / _GB:.1f} GB"
        )
        own = [f"{key}={value}" for key, value in self.labels.items() if not key.startswith("ray.io/")]
        return f"{has}, {', '.join(own)}" if own else has


@dataclass(frozen=True, slots=True)
class TrainerRequest:
    """What Ray reserves for a trainer.

    Attributes:
        device: Kind of device that it trains on.
        cpus: CPUs, and threads.
        gpus: GPUs, or a share of one.
        memory_gb: Memory, 10^9 bytes.
        labels: Ray's label selector.
        jobs: Categories that it trains together, at most.
    """

    device: Device
    cpus: int
    gpus: float
    memory_gb: float
    labels: Mapping[str, str]
    jobs: int = 1

    @property
    def memory_share(self) -> float:
        """Share of a GPU's memory: a trainer uses one GPU at most."""
        return min(self.gpus, 1.0)

    def options(self) -> dict[str, Any]:
        """Return the request as options of a Ray actor."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "memory": int(self.memory_gb * _GB) or None,
            "label_selector": dict(self.labels) or None,
        }

    def count_in(self, resources: Mapping[str, float]) -> int:
        """Return how many such trainers the resources suffice for."""
        wanted = {"CPU": float(self.cpus), "GPU": self.gpus, "memory": float(int(self.memory_gb * _GB))}
        return min(math.floor(resources.get(name, 0) / need + 1e-6) for name, need in wanted.items() if need)

    def is_met_by(self, node: Node) -> bool:
        """Whether a node, if nothing else ran there, could run such a trainer."""
        return self.count_in(node.resources) > 0 and all(
            _selects(selector, node.labels.get(key)) for key, selector in self.labels.items()
        )

    @property
    def summary(self) -> str:
        """Describe the request in words."""
        parts = [f"{self.cpus} CPUs" if self.cpus > 1 else "a CPU"]
        parts += [f"{self.gpus:g} GPUs"] if self.gpus else []
        parts += [f"{self.memory_gb:g} GB of memory"] if self.memory_gb else []
        parts += [f"the label {key}={value}" for key, value in self.labels.items()]
        return ", ".join(parts)


def live_nodes() -> list[Node]:
    """List the nodes of the joined cluster that Ray considers alive."""
    return [
        Node(
            node["NodeID"],
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            (node["NodeManagerAddress"], node["NodeManagerPort"]),
            node["Resources"],
            node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def make_requests(training: TrainingSettings, nodes: Sequence[Node]) -> list[TrainerRequest]:
    """Choose the kinds of trainers for a cluster, GPUs first: one kind, except for `training.device=both`.

    Args:
        training: Device, threads, GPUs, memory and labels.
        nodes: The cluster's nodes.
    """
    gpu_exists = any(node.resources.get("GPU") for node in nodes)
    on_gpu = training.device in ("gpu", "both") or (training.device == "auto" and (gpu_exists or training.num_gpus > 0))
    on_cpu = training.device in ("cpu", "both") or not on_gpu
    common = (training.memory_gb, training.labels)
    gpus = training.num_gpus or 1.0
    together = max(1, int(training.categories_per_gpu * min(gpus, 1.0)))
    requests = [TrainerRequest("cuda", training.threads, gpus, *common, together)] if on_gpu else []
    return [*requests, TrainerRequest("cpu", training.threads, 0.0, *common)] if on_cpu else requests


def require_node(requests: Sequence[TrainerRequest], nodes: Sequence[Node]) -> None:
    """Refuse requests that no node of the cluster can ever meet.

    Raises:
        ConfigError: No node meets any of them.
    """
    if any(request.is_met_by(node) for request in requests for node in nodes):
        return
    listed = "; ".join(node.summary for node in nodes[:_MAX_NODES_LISTED])
    more = f"; and {len(nodes) - _MAX_NODES_LISTED} more" if len(nodes) > _MAX_NODES_LISTED else ""
    raise ConfigError(
        f"no node can train a category, which needs {' or '.join(request.summary for request in requests)}. "
        f"The cluster has: {listed}{more}. Ask for less (--threads, --device, --gpus-per-category, --memory, --label), "
        "start such a node, or wait for one that an autoscaler starts with --wait-for-nodes"
    )


def _selects(selector: str, value: str | None) -> bool:
    """Whether Ray's label selector, `a`, `!a`, `in(a,b)` or `!in(a,b)`, selects a label's value."""
    wanted = selector.removeprefix("!")
    values = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
    return (value in [one.strip() for one in values]) != selector.startswith("!")
