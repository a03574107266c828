"""Simulation: the workers' real loop on simulated time, with faults at every await and outages of everything.

    PYTHONPATH=tests python -m soak.simulation --endings 1000000

An episode is a plant of a few workers and some hundred images, with a handful of faults, all from one seed. At its end
every image must have ended exactly once, good ones as results, and within twice `worker.claim_idle_ms` and ten seconds
after the last fault. Whatever fails is printed with its seed: `--seed N --episodes 1` does the same again.

The last line is JSON; the exit code is 1 where an image was lost, ended twice, ended falsely, or was stuck.
"""

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress

from schemas.errors import Reason
from schemas.messages import DeadLetter
from schemas.settings import WorkerSettings
from soak.simulated_plant import ENDINGS, Kind, Plant, make_plan
from soak.simulated_time import SimulatedLoop, StandstillError

_IMAGES = 1000
_CLAIM_IDLE_MS = (3_000, 10_000, 60_000)
"""Of the workers of an episode, and with it the longest step; everything else is at its default."""
_FAILURES_SHOWN = 10

err = Console(stderr=True)


@dataclass
class Report:
    """What an episode, or all of them, came to. The lists name episodes' seeds and entries.

    Attributes:
        endings: Images that ended.
        faults: How often each befell the plant.
        lost: Images that neither ended nor are on the stream.
        duplicates: Images that ended more than once.
        falsely_dead: Good images that ended as dead letters, and others that ended for another reason than theirs.
        falsely_good: Images that are none, with a result.
        stuck: Images that have not ended in time.
    """

    endings: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    falsely_dead: list[str] = field(default_factory=list)
    falsely_good: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)

    @property
    def failures(self) -> dict[str, list[str]]:
        """Return what must be empty."""
        names = ("lost", "duplicates", "falsely_dead", "falsely_good", "stuck")
        return {name: getattr(self, name) for name in names}

    def add(self, other: "Report") -> None:
        """Add another's counts and failures."""
        self.endings += other.endings
        self.faults += other.faults
        for name, failures in other.failures.items():
            getattr(self, name).extend(failures)


def run_episode(seed: int) -> Report:
    """Run an episode; the same seed gives the same report."""
    dice = random.Random(seed)  # noqa: S311 - no secret
    random.seed(seed)  # the jitter of waits between retries
    claim_idle_ms = dice.choice(_CLAIM_IDLE_MS)
    settings = WorkerSettings(claim_idle_ms=claim_idle_ms, stage_timeout_s=claim_idle_ms / 1000 + 10)
    loop = SimulatedLoop()
    report = Report()
    try:
        asyncio.set_event_loop(loop)
        plant = Plant(loop, make_plan(dice, _IMAGES), dice, settings)
        try:
            loop.run_until_complete(plant.run(lambda kind: _patience_s(kind, settings)))
        except StandstillError as error:
            report.stuck.append(f"seed {seed}: {error}")
        report.add(_judge(seed, plant))
    finally:
        loop.close()
        asyncio.set_event_loop(None)
    return report


def _patience_s(kind: Kind, settings: WorkerSettings) -> float:
    """Return how long after the last fault an image may take: what kills workers is tried `max_deliveries` times."""
    claim_idle_s = settings.claim_idle_ms / 1000
    once_s = 2 * claim_idle_s + 10
    return once_s * (settings.max_deliveries + 1) if kind in {Kind.POISONOUS, Kind.DEADLY} else once_s


def _judge(seed: int, plant: Plant) -> Report:
    """Compare how the images of an episode ended with how they must."""
    report = Report(faults=Counter({str(fault): count for fault, count in plant.faults.items()}))
    ended: Counter[str] = Counter()
    for completion in plant.stream.ended:
        key = completion.entry_id
        ended[key] += 1
        reason = completion.outcome.reason if isinstance(completion.outcome, DeadLetter) else None
        kind = plant.kinds[key]
        expected: Reason | None = ENDINGS.get(kind)
        if reason is not None and reason is not expected:
            report.falsely_dead.append(f"seed {seed}: {key} ({kind}): {reason}")
        elif reason is not expected:
            report.falsely_good.append(f"seed {seed}: {key} ({kind})")
    report.endings = len(ended)
    report.duplicates += [f"seed {seed}: {key}" for key, times in ended.items() if times > 1]
    open_ids = plant.open_ids()
    report.stuck += [f"seed {seed}: {key} ({plant.kinds[key]})" for key in sorted(open_ids)]
    report.lost += [f"seed {seed}: {key}" for key in plant.kinds if key not in ended and key not in open_ids]
    return report


def run(endings: int, seed: int, episodes: int | None, processes: int) -> Report:
    """Run episodes, the seeds in order, until so many images have ended."""
    total = Report()
    logging.disable(logging.CRITICAL)  # workers log each fault
    with (
        multiprocessing.get_context("spawn").Pool(processes, initializer=_be_quiet) as pool,
        Progress(console=err, disable=not err.is_terminal) as progress,
    ):
        bar = progress.add_task("images", total=endings if episodes is None else episodes * _IMAGES)
        for report in pool.imap(run_episode, _seeds(seed, endings, episodes), chunksize=8):
            total.add(report)
            progress.advance(bar, report.endings)
    return total


def _seeds(first: int, endings: int, episodes: int | None) -> Iterator[int]:
    return iter(range(first, first + (episodes or -(-endings // _IMAGES))))


def _be_quiet() -> None:
    logging.disable(logging.CRITICAL)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="simulation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--endings", type=int, default=1_000_000, help="images that end, at least (default 1000000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode; the next ones count up (default 0)")
    parser.add_argument("--episodes", type=int, help="so many, whatever --endings says")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at once (default: the CPUs)")
    parser.add_argument("--log", action="store_true", help="print what the workers log; for one episode")
    arguments = parser.parse_args()
    began_s = time.perf_counter()
    if arguments.log:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        report = run_episode(arguments.seed)
    else:
        report = run(arguments.endings, arguments.seed, arguments.episodes, arguments.processes)
    for name, failures in report.failures.items():
        for failure in failures[:_FAILURES_SHOWN]:
            err.print(f"{name}: {failure}", style="red", highlight=False)
    counts = {name: len(failures) for name, failures in report.failures.items()}
    document = {"bench": "simulation", "endings": report.endings, "faults": report.faults.total(), **counts}
    document |= {"kinds": dict(report.faults.most_common()), "seconds": round(time.perf_counter() - began_s, 1)}
    sys.stdout.write(json.dumps(document) + "\n")
    if any(counts.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
