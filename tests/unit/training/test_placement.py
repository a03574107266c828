"""What a trainer needs of a node, and what is refused at once because no node has it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from schemas.errors import ConfigError
from schemas.settings import TrainingSettings
from training.placement import Node, TrainerRequest, make_requests, require_node


def node(name: str, cpus: float, gpus: float = 0, memory_gb: float = 8, **labels: str) -> Node:
    resources = {"CPU": cpus, "memory": memory_gb * 1e9} | ({"GPU": gpus} if gpus else {})
    return Node(name, name, ("127.0.0.1", 1), resources, labels)


def request(**fields: Any) -> TrainerRequest:
    return replace(TrainerRequest("cpu", cpus=1, gpus=0.0, memory_gb=1.0, labels={}), **fields)


CPU_NODE, GPU_NODE, HEAD = node("plain", 16), node("fast", 8, 2), node("head", 0)


@pytest.mark.parametrize(
    ("device", "nodes", "expected"),
    [
        ("auto", [CPU_NODE], [("cpu", 0)]),
        ("auto", [CPU_NODE, GPU_NODE], [("cuda", 1)]),  # CPUs would give other weights: only where asked for
        ("both", [CPU_NODE, GPU_NODE], [("cuda", 1), ("cpu", 0)]),
        ("cpu", [GPU_NODE], [("cpu", 0)]),
        ("gpu", [CPU_NODE], [("cuda", 1)]),
        ("auto", [], [("cpu", 0)]),
    ],
)
def test_device_decides_on_the_kinds_of_trainers(
    device: str, nodes: list[Node], expected: list[tuple[str, float]]
) -> None:
    requests = make_requests(TrainingSettings.model_validate({"device": device}), nodes)
    assert [(one.device, one.gpus) for one in requests] == expected


def test_threads_never_follow_the_cluster() -> None:
    for nodes in ([node("one", 1)], [node("large", 64)], [node("a", 16)] * 4):
        assert [one.cpus for one in make_requests(TrainingSettings(), nodes)] == [1]
    assert [one.cpus for one in make_requests(TrainingSettings(threads=4), [CPU_NODE])] == [4]


@pytest.mark.parametrize(
    ("settings", "jobs"),
    [
        ({}, 8),
        ({"categories_per_gpu": 1}, 1),
        ({"categories_per_gpu": 12, "num_gpus": 0.25}, 3),
        ({"categories_per_gpu": 2, "num_gpus": 0.25}, 1),
        ({"categories_per_gpu": 5, "num_gpus": 2}, 5),  # a trainer uses one
    ],
)
def test_categories_together_are_in_proportion_to_the_share_of_a_gpu(settings: dict[str, float], jobs: int) -> None:
    training = TrainingSettings.model_validate({"device": "both", **settings})
    assert [one.jobs for one in make_requests(training, [CPU_NODE, GPU_NODE])] == [jobs, 1]


@pytest.mark.parametrize(
    ("asked", "resources", "count"),
    [
        (request(), {"CPU": 4, "memory": 8e9}, 4),
        (request(cpus=3), {"CPU": 8, "memory": 8e9}, 2),
        (request(memory_gb=3), {"CPU": 8, "memory": 8e9}, 2),
        (request(memory_gb=0), {"CPU": 8}, 8),
        (request(gpus=0.25), {"CPU": 8, "GPU": 1, "memory": 8e9}, 4),
        (request(gpus=1), {"CPU": 8, "memory": 8e9}, 0),
        (request(), {}, 0),
    ],
)
def test_trainers_are_counted_by_the_scarcest_resource(
    asked: TrainerRequest, resources: Mapping[str, float], count: int
) -> None:
    assert asked.count_in(resources) == count


@pytest.mark.parametrize(
    ("selector", "is_met"),
    [
        ("a", True),
        ("b", False),
        ("!a", False),
        ("!b", True),
        ("in(a,b)", True),
        ("in(b, c)", False),
        ("!in(b,c)", True),
    ],
)
def test_labels_select_as_in_ray(selector: str, is_met: bool) -> None:  # noqa: FBT001 - a parameter of the test
    assert request(labels={"zone": selector}).is_met_by(node("one", 4, zone="a")) is is_met
    assert request(labels={"zone": selector}).is_met_by(node("two", 4)) is selector.startswith("!")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request(cpus=17), "needs 17 CPUs, 1 GB of memory"),
        (request(gpus=3), "a CPU, 3 GPUs"),
        (request(memory_gb=9), "9 GB of memory"),
        (request(labels={"zone": "a"}), "the label zone=a"),
    ],
)
def test_request_that_no_node_meets_is_refused_with_what_there_is(asked: TrainerRequest, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_node([asked], [HEAD, CPU_NODE, node("fast", 8, 2, zone="b")])
    text = str(refused.value)
    assert words in text
    assert "head: 0 CPUs, 0 GPUs, 8.0 GB; plain: 16 CPUs, 0 GPUs, 8.0 GB; fast: 8 CPUs, 2 GPUs, 8.0 GB, zone=b." in text
    assert "--wait-for-nodes" in text


def test_one_kind_that_a_node_meets_is_enough() -> None:
    require_node([request(gpus=1), request()], [HEAD, CPU_NODE])
