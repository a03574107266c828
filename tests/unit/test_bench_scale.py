"""The simulated plant of `bench.scale`, where the right answer is known."""

import json
from typing import Any

import numpy as np
import pytest

from bench.scale import SCENARIOS, Plan, main, simulate
from bench.scale_plant import Costs, Layout, Plant
from schemas.settings import Settings

pytestmark = pytest.mark.unit

IMAGE_S = 0.01
COSTS = Costs(
    worker_image_s=IMAGE_S,
    batch_s=0.0,
    image_s=0.0,
    load_s=0.05,
    start_s=10.0,
    replica_noticed_s=5.0,
    node_noticed_s=10.0,
)
PLAN = Plan.of(1000.0)


def settings(**sections: Any) -> Settings:
    return Settings.model_validate(sections)


def layout(rate: float, **others: Any) -> Layout:
    sizes = {"nodes": 2, "workers_a_node": 8, "detectors_a_node": 2, "workers": 1, "detectors": 1, "bundle": 1}
    return Layout(lambda _: rate, **(sizes | others))


def one_by_one(rate: float, costs: Costs = COSTS, seed: int = 0) -> Plant:
    """Make a plant of one worker that takes one image at a time."""
    return Plant(layout(rate), settings(worker={"batch_size": 1, "in_flight": 1}), costs, seed)


@pytest.mark.parametrize("load", [0.4, 0.7])
def test_wait_for_one_worker_is_that_of_a_queue_with_constant_service(load: float) -> None:
    plant = one_by_one(load / IMAGE_S)
    plant.run(300)
    waits = np.array(plant.completed)[100:, 1] - IMAGE_S
    assert waits.mean() == pytest.approx(load * IMAGE_S / (2 * (1 - load)), rel=0.1)  # M/D/1
    assert (waits < 1e-9).mean() == pytest.approx(1 - load, abs=0.02)


def test_batch_takes_what_the_detector_takes_beside_the_worker() -> None:
    plant = one_by_one(0.1, Costs(IMAGE_S, 0.5, 0.25, 0.05, 10.0, 5.0, 10.0))
    plant.run(300)
    assert np.median([seconds for _, seconds in plant.completed]) == pytest.approx(IMAGE_S + 0.75)


def test_what_is_more_than_the_capacity_is_refused_once_the_backlog_is_full() -> None:
    options = settings(worker={"batch_size": 1, "in_flight": 1}, backlog={"max_images": 50})
    plant = Plant(layout(2 / IMAGE_S), options, COSTS, 0)
    plant.run(60)
    assert plant.refused / plant.pushed == pytest.approx(0.5, abs=0.03)
    assert plant.unfinished in (49, 50)
    assert max(seconds for at_s, seconds in plant.completed if at_s > 2) <= 51 * IMAGE_S


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_image_pushed_is_completed_refused_or_on_the_streams(name: str) -> None:
    scenario = SCENARIOS[name]
    plant = Plant(scenario.layout(PLAN), PLAN.settings(), COSTS, 3)
    if scenario.fault is not None:
        fault = scenario.fault
        plant.at(20.0, lambda: fault(plant))
    bundle = scenario.layout(PLAN).bundle
    for until_s in (10.0, 20.1, 24.0, 60.0, 100.0):
        plant.run(until_s)
        assert plant.pushed == plant.refused + bundle * len(plant.completed) + plant.unfinished
    assert plant.completed


def test_images_of_a_killed_worker_are_completed_by_another_after_the_claim_time() -> None:
    options = settings(redis={"shards": 2}, worker={"replicas": 3})
    plant = Plant(layout(250, workers=3, nodes=3, workers_a_node=1), options, COSTS, 0)
    plant.run(10)
    plant.kill_node(2)
    plant.run(80)
    late = sorted(seconds for _, seconds in plant.completed)[-3:]
    assert 39 < late[-1] < 66  # a third of claim_idle_ms less, a sweep more


def test_shard_is_read_again_within_four_missed_heartbeats() -> None:
    options = settings(redis={"shards": 4}, worker={"replicas": 4})
    plant = Plant(layout(100, workers=4, nodes=4, workers_a_node=1), options, COSTS, 0)
    plant.run(20)
    assert plant.longest_unread_s < 0.75
    plant.kill_node(1)
    plant.run(40)
    assert 2.0 < plant.longest_unread_s <= 3.75


def test_pushes_wait_for_a_server_that_is_away() -> None:
    plant = one_by_one(50)
    plant.at(10.0, lambda: plant.stop_server(0, 10.0))
    plant.run(19.9)
    pushed = plant.pushed
    plant.run(60)
    assert pushed == pytest.approx(500, abs=80)
    assert 9.5 < max(seconds for _, seconds in plant.completed) < 25
    assert plant.pushed == pytest.approx(3000, abs=200)


def test_models_that_fit_into_the_replicas_together_are_loaded_once() -> None:
    sizes = {"workers": 1, "detectors": 2, "categories": 20, "resident": 14}
    options = settings(detector={"replicas": 2})
    plant = Plant(layout(50, **sizes), options, COSTS, 0)
    plant.run(40)
    loads = plant.loads
    plant.run(120)
    assert loads > 0
    assert plant.loads - loads < 0.01 * 50 * 80


def test_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    small = Plan.of(300.0)
    runs = [simulate(SCENARIOS["node"], small, 2.5, seed)[0] for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_ten_times_the_load_needs_ten_times_of_each() -> None:
    one, ten = Plan.of(5000), Plan.of(50_000)
    assert (one.shards, one.workers, one.detectors, one.nodes) == (8, 12, 3, 4)
    assert (ten.shards, ten.workers, ten.detectors, ten.nodes) == (79, 118, 23, 26)


def test_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rate", "200", "--minutes", "3", "--scenarios", "steady", "--no-ten-times"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["bench"] == "scale"
    assert set(last["scenarios"]) == {"steady"}
    assert last["scenarios"]["steady"]["refused_share"] == 0
