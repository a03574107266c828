"""How a plant of 100 lines behaves, and one of ten times that: sizes from measured figures, and a simulation.

    python -m bench.scale                                      # all scenarios of 5,000 img/s, and ten times that
    python -m bench.scale --scenarios node hot --minutes 30
    python -m bench.scale --rate 500 --scenarios steady --seed 7 --picture steady.png

Sizes are measured figures divided, at 80 % of what each part can do. `bench.scale_plant` then runs the policies of the
service (how many replicas, who reads which shard, which detector takes a call) on a simulated clock; what it
approximates is written there. Nothing is started, and a scenario with the same seed gives the same figures anywhere.

Prints a table and one JSON line, and draws a picture.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.scale_plant import Costs, Layout, Plant
from bench.scale_plot import Drawn, draw
from schemas.settings import Settings

CAMERAS = 100
IMAGES_A_CAMERA = 50.0

UTILISATION = 0.8
PUSHES_A_SHARD = 800.0
"""Confirmed pushes a second of one server, `appendfsync everysec`, 20 KB: docs/guarantees.md, the lower end."""
WORKER_IMAGES = 531.0
"""img/s of one worker process with its detector, JPEGs of 300 px, one NVIDIA H200, 16 cores: docs/benchmarks/gpu.md."""
DETECTOR_BATCH_S = 0.0105
DETECTOR_IMAGE_S = 0.00003
"""A batch of the detector, engine torch in float16, one category: 10.3, 11.5 and 14.3 ms for 1, 32 and 128 images,
measured on one NVIDIA H200, 27 November 2026."""
DETECTOR_IMAGES = 2777.0
"""img/s of the same in batches of 32."""
LOAD_S = 0.052
"""Loading a category, on the same card."""
START_S = 10.3
"""Until a worker process is ready, on the same machine."""
REPLICA_NOTICED_S = 5.0
"""Serve asks each replica's health every 5 s (`serving.app`)."""
NODE_NOTICED_S = 30.0
"""Assumed: not measured."""
WORKERS_A_NODE = 8
"""Of 16 cores: two cores a worker. Assumed: the CPU of a worker was not measured."""

COSTS = Costs(1 / WORKER_IMAGES, DETECTOR_BATCH_S, DETECTOR_IMAGE_S, LOAD_S, START_S, REPLICA_NOTICED_S, NODE_NOTICED_S)
FAULT_S = 120.0
RAMP_S = 60.0
AWAY_S = 10.0
SETTLED_S = 120.0
"""The last seconds of a scenario, whose figures are given apart."""

err = Console(stderr=True, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything a load needs.

    Attributes:
        rate: Images a second.
        shards: Stream servers, or primaries of a cluster.
        workers: Stream workers.
        detectors: Detectors, one GPU each.
        nodes: Servers of 16 cores and one GPU for workers and detectors; one of ten, and at least one, is a spare.
    """

    rate: float
    shards: int
    workers: int
    detectors: int
    nodes: int

    @classmethod
    def of(cls, rate: float) -> "Plan":
        """Divide the load by what each part can do."""
        shards, workers, detectors = (
            math.ceil(rate / (UTILISATION * each)) for each in (PUSHES_A_SHARD, WORKER_IMAGES, DETECTOR_IMAGES)
        )
        needed = max(detectors, math.ceil(workers / WORKERS_A_NODE))
        return cls(rate, shards, workers, detectors, needed + max(1, math.ceil(needed / 10)))

    def settings(self) -> Settings:
        """Return the service's settings: twice as many replicas may be started as are needed."""
        return Settings.model_validate(
            {
                "redis": {"shards": self.shards},
                "worker": {"batch_size": 64, "replicas": 1, "max_replicas": 2 * self.workers},
                "detector": {"max_batch_images": 128, "replicas": 1, "max_replicas": 2 * self.detectors},
            }
        )

    def layout(self, load: Callable[[float], float] | None = None, **others: float) -> Layout:
        """Return the plant with all its replicas running."""
        kept = {
            "nodes": self.nodes,
            "workers_a_node": WORKERS_A_NODE,
            "detectors_a_node": 2,
            "workers": self.workers,
            "detectors": self.detectors,
        }
        return Layout(load or (lambda _: self.rate), **(kept | others))  # type: ignore[arg-type]  # of several types


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load and what happens to it.

    Attributes:
        title: Of its column in the picture.
        layout: The plant at the start.
        fault: Does something to it at `FAULT_S`.
    """

    title: str
    layout: Callable[[Plan], Layout]
    fault: Callable[[Plant], None] | None = None


def _shift_change(plan: Plan) -> Layout:
    half = Plan.of(plan.rate / 2)

    def load(at_s: float) -> float:
        return plan.rate / 2 * (1 + min(1.0, max(0.0, (at_s - FAULT_S) / RAMP_S)))

    return plan.layout(load, workers=half.workers, detectors=half.detectors)


def _nothing(_: Plant) -> None:
    """Mark the time of a change of load in the picture."""


SCENARIOS = {
    "steady": Scenario("steady load", Plan.layout),
    "one": Scenario("from one replica", lambda plan: plan.layout(workers=1, detectors=1)),
    "doubling": Scenario("doubles in a minute", _shift_change, _nothing),
    "node": Scenario("node killed", Plan.layout, lambda plant: plant.kill_node(0)),
    "worker": Scenario("worker killed", Plan.layout, lambda plant: plant.kill_worker_of(0)),
    "hot": Scenario(
        "32 hot of 1,000",
        lambda plan: plan.layout(categories=1000, hot_categories=32, hot_share=0.8, resident=400),
    ),
    "server": Scenario("server away for 10 s", Plan.layout, lambda plant: plant.stop_server(0, AWAY_S)),
}


@dataclass(frozen=True, slots=True)
class Found:
    """What a scenario gave.

    Attributes:
        refused_share: Of the images pushed.
        p50_s: Median of the time from push to result.
        p99_s: 99th percentile of it.
        longest_s: Longest of it.
        settled_refused_share: Share refused in the last two minutes.
        settled_p50_s: Median in the last two minutes.
        settled_p99_s: 99th percentile in the last two minutes.
        workers: At the start, most, at the end.
        detectors: At the start, most, at the end.
        changes: How often the number of workers or detectors changed in the last half.
        loads_per_1000: Versions loaded per 1,000 images.
        settled_loads_per_1000: The same in the last two minutes.
        longest_unread_s: Longest time that a shard was without a reader.
        unfinished: Images on the streams at the end.
        simulated_s: Length of the scenario.
    """

    refused_share: float
    p50_s: float
    p99_s: float
    longest_s: float
    settled_refused_share: float
    settled_p50_s: float
    settled_p99_s: float
    workers: tuple[int, int, int]
    detectors: tuple[int, int, int]
    changes: int
    loads_per_1000: float
    settled_loads_per_1000: float
    longest_unread_s: float
    unfinished: int
    simulated_s: float


def simulate(scenario: Scenario, plan: Plan, minutes: float, seed: int) -> tuple[Found, Drawn]:
    """Run a scenario.

    Args:
        scenario: What to run.
        plan: Sizes of the plant.
        minutes: How long, simulated.
        seed: Of all that is random.
    """
    until_s = 60 * minutes
    plant = Plant(scenario.layout(plan), plan.settings(), COSTS, seed)
    if scenario.fault is not None:
        fault = scenario.fault
        plant.at(FAULT_S, lambda: fault(plant))
    plant.run(max(0.0, until_s - SETTLED_S))
    before = plant.pushed, plant.refused, plant.loads, len(plant.completed)
    plant.run(until_s)
    pushed, refused, loads = plant.pushed - before[0], plant.refused - before[1], plant.loads - before[2]
    latencies = np.array(plant.completed)
    seconds, settled = latencies[:, 1], latencies[before[3] :, 1]
    replicas = np.array(plant.replicas)
    half = replicas[len(replicas) // 2 :, 1:]
    found = Found(
        refused_share=plant.refused / plant.pushed,
        p50_s=float(np.median(seconds)),
        p99_s=float(np.quantile(seconds, 0.99)),
        longest_s=float(seconds.max()),
        settled_refused_share=refused / pushed,
        settled_p50_s=float(np.median(settled)),
        settled_p99_s=float(np.quantile(settled, 0.99)),
        workers=_ends(replicas[:, 1]),
        detectors=_ends(replicas[:, 2]),
        changes=int(np.count_nonzero(np.diff(half, axis=0))),
        loads_per_1000=1000 * plant.loads / plant.pushed,
        settled_loads_per_1000=1000 * loads / pushed,
        longest_unread_s=plant.longest_unread_s,
        unfinished=plant.unfinished,
        simulated_s=until_s,
    )
    fault_s = FAULT_S if scenario.fault else None
    return found, Drawn(replicas, np.array(plant.backlog)[:, :2], latencies, fault_s)


def _ends(numbers: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> tuple[int, int, int]:
    return int(numbers[0]), int(numbers.max()), int(numbers[-1])


def show(found: dict[str, Found]) -> None:
    """Print a table for people, and the last line for programs."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("scenario", "refused", "median / 99 % / longest s", "99 % settled", "workers", "detectors"):
        table.add_column(heading)
    for heading in ("changes", "loads per 1,000 (settled)", "unread s"):
        table.add_column(heading, justify="right")
    for name, one in found.items():
        table.add_row(
            name,
            f"{one.refused_share:.2%}",
            f"{one.p50_s:.3f} / {one.p99_s:.3f} / {one.longest_s:.1f}",
            f"{one.settled_p99_s:.3f}",
            " ".join(map(str, one.workers)),
            " ".join(map(str, one.detectors)),
            str(one.changes),
            f"{one.loads_per_1000:.2f} ({one.settled_loads_per_1000:.2f})",
            f"{one.longest_unread_s:.2f}",
        )
    Console(width=150).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=CAMERAS * IMAGES_A_CAMERA, help="images a second (5000)")
    parser.add_argument("--minutes", type=float, default=10.0, help="simulated length of each scenario (10)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (0)")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="which (all)")
    parser.add_argument("--no-ten-times", action="store_true", help="leave out the steady load of ten times the rate")
    parser.add_argument("--picture", type=Path, help="where to draw (nowhere)")
    given = parser.parse_args(arguments)
    plan = Plan.of(given.rate)
    found: dict[str, Found] = {}
    drawn: dict[str, Drawn] = {}
    for name in given.scenarios:
        began_s = time.process_time()
        found[name], drawn[SCENARIOS[name].title] = simulate(SCENARIOS[name], plan, given.minutes, given.seed)
        err.print(f"{name}: {given.minutes:g} min in {time.process_time() - began_s:.0f} s of CPU")
    ten_times = Plan.of(10 * given.rate)
    if not given.no_ten_times:
        minutes = min(given.minutes, 3.0)
        found["ten times"], _ = simulate(SCENARIOS["steady"], ten_times, minutes, given.seed)
    show(found)
    if given.picture is not None:
        draw(drawn, given.picture)
    figures = {name: asdict(one) for name, one in found.items()}
    plans = [asdict(plan), asdict(ten_times)]
    print(json.dumps({"bench": "scale", "seed": given.seed, "plans": plans, "scenarios": figures}))


if __name__ == "__main__":
    main()
