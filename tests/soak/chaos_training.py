"""Chaos in training: a cluster loses parts while its categories are trained; every run ends, as if it had not.

    PYTHONPATH=tests python -m soak.chaos_training

A Ray cluster of a head without CPUs and two workers, and `flawstream train` on it as a user runs it, once undisturbed
and once a case. After each case every category must have one version, be current, and have the weights and thresholds
of the undisturbed run, bit for bit.

The last line is JSON; the exit code is 1 where a category is missing, differs or is there twice, where a version is
damaged, where the command ended with another code than 0, or later than a minute after the last job that the fault
spared, or where a fault hit no job.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers.image_files import write_images
from helpers.waiting import wait_until
from rich.console import Console

from flawstream.registry.registry import WEIGHTS_FILE, Registry
from schemas.errors import RegistryError
from soak.training_cluster import TrainingCluster

_RUN_S = 600.0
_LATE_S = 60.0
_NODE_DEAD_S = 5.0
_MUST_RETRY = {"raylet_killed", "trainer_killed", "link_down"}
_LINE = re.compile(r"^(part\d+): (\w+)")
_HOLD = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=1)
class Holder:
    def hold(self): return True
holder = Holder.remote()
ray.get(holder.hold.remote())
print("held", flush=True)
time.sleep(3600)
"""
err = Console(stderr=True)


@dataclass
class Run:
    """A `flawstream train`.

    Attributes:
        process: The process.
        done_s: When each category was done.
        retried: Categories that were retried.
        ended_s: When the process ended.
    """

    process: subprocess.Popen[bytes]
    log: Path
    done_s: dict[str, float] = field(default_factory=dict)
    retried: set[str] = field(default_factory=set)
    ended_s: float = 0.0
    output: bytes = b""

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.output = self.process.stdout.read()

    def look(self) -> None:
        """Read what it has reported."""
        for line in self.log.read_text(errors="replace").splitlines():
            if (found := _LINE.match(line)) is not None:
                name, stage = found.groups()
                if stage == "done":
                    self.done_s.setdefault(name, time.monotonic())
                elif stage == "waiting":
                    self.retried.add(name)

    def wait(self) -> int:
        """Wait for its end; return the exit code."""

        def has_ended() -> bool:
            self.look()
            return self.process.poll() is not None

        wait_until(has_ended, lambda: f"training ends: {self.log.read_text()[-3000:]}", deadline_s=_RUN_S, every_s=0.1)
        self.ended_s = time.monotonic()
        self._reader.join()
        return self.process.returncode


@dataclass(frozen=True)
class Outcome:
    """What a case came to.

    Attributes:
        exit_code: Of the last command.
        trained: Categories with a version that is current.
        equal: Those among them that are equal to the undisturbed run's.
        doubled: Versions beyond one a category.
        half_written: Versions that cannot be read whole.
        retried: Categories that were retried.
        late_s: Seconds from the end of the last job that the fault spared, or of the fault, to the end of the command.
        seconds: Of the case.
    """

    exit_code: int
    trained: int
    equal: int
    doubled: int
    half_written: int
    retried: int
    late_s: float
    seconds: float


class Chaos:
    """The cases on one cluster.

    Args:
        cluster: The cluster.
        folder: For data, registries and logs.
        categories: Number of categories.
        epochs: Of each; sets how long a job takes.
        link_down_s: How long the link stays down.
    """

    def __init__(
        self, cluster: TrainingCluster, folder: Path, categories: int, epochs: int, link_down_s: float
    ) -> None:
        self.cases: dict[str, Callable[[str], Run]] = {
            "raylet_killed": self._kill_raylet,
            "trainer_killed": self._kill_trainer,
            "driver_killed": self._kill_driver,
            "start_after_node_death": self._start_after_node_death,
            "cpu_held": self._hold_cpu,
            "link_down": self._take_link_down,
        }
        self._cluster, self._folder, self._link_down_s = cluster, folder, link_down_s
        self._names = [f"part{number:03}" for number in range(categories)]
        for number, name in enumerate(self._names):
            write_images(folder / "data" / name / "train" / "good", 12 + number % 3)
        self._config = folder / "settings.yaml"
        self._config.write_text(
            json.dumps(
                {
                    "model": {"strides": [16, 32], "input_size": 64, "flow_steps": 2, "hidden_ratio": 0.2},
                    "training": {"epochs": epochs, "batch_size": 4, "false_alarm_rate": 0.4, "int8": False},
                }
            )
        )
        self._struck_s = 0.0
        self._reference: dict[str, object] = {}

    def run_undisturbed(self) -> float:
        """Train everything without a fault, unless an earlier call did; return the seconds."""
        started_s = time.monotonic()
        run = self._train("undisturbed")
        if run.wait() != 0:
            raise RuntimeError(f"the undisturbed run failed: {run.log.read_text()[-3000:]}")
        self._reference = self._versions("undisturbed")
        assert len(self._reference) == len(self._names)
        return time.monotonic() - started_s

    def run_case(self, name: str) -> Outcome:
        """Run one case, and judge it."""
        shutil.rmtree(self._folder / name, ignore_errors=True)
        started_s = self._struck_s = time.monotonic()
        run = self.cases[name](name)
        exit_code = run.wait()
        seconds = time.monotonic() - started_s
        self._repair(name)
        spared = [run.done_s[one] for one in run.done_s if one not in run.retried]
        registry = Registry(str(self._folder / name))
        versions = self._versions(name)
        counted = {one: len(registry.versions(one)) for one in self._names}
        return Outcome(
            exit_code=exit_code,
            trained=len(versions),
            equal=sum(versions.get(one) == self._reference[one] for one in self._names),
            doubled=sum(max(0, count - 1) for count in counted.values()),
            half_written=sum(counted.values()) - sum(self._readable(registry, one) for one in self._names),
            retried=len(run.retried),
            late_s=round(run.ended_s - max([*spared, self._struck_s]), 1),
            seconds=round(seconds, 1),
        )

    def _kill_raylet(self, name: str) -> Run:
        run = self._train_on_both(name)
        self._cluster.kill_node(1)
        self._struck_s = time.monotonic()
        return run

    def _kill_trainer(self, name: str) -> Run:
        run = self._train_on_both(name)
        os.kill(self._cluster.trainers(1)[0], signal.SIGKILL)
        self._struck_s = time.monotonic()
        return run

    def _kill_driver(self, name: str) -> Run:
        run = self._train_on_both(name)
        wait_until(lambda: run.look() or run.done_s, "a category is done")  # type: ignore[func-returns-value]
        run.process.kill()
        run.process.wait()
        self._struck_s = time.monotonic()
        return self._train(name)

    def _start_after_node_death(self, name: str) -> Run:
        self._cluster.kill_node(1)
        time.sleep(_NODE_DEAD_S)
        self._struck_s = time.monotonic()
        return self._train(name)

    def _hold_cpu(self, name: str) -> Run:
        holder = self._cluster.run(
            sys.executable, "-c", _HOLD, self._cluster.address, log=self._folder / f"{name}.holder.log"
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline().strip() == b"held"
            self._struck_s = time.monotonic()
            run = self._train(name)
            run.wait()
        finally:
            holder.kill()
            holder.wait()
        return run

    def _take_link_down(self, name: str) -> Run:
        run = self._train_on_both(name)
        self._cluster.set_link(1, up=False)
        self._struck_s = time.monotonic()
        threading.Timer(self._link_down_s, self._cluster.set_link, (1,), {"up": True}).start()
        return run

    def _train_on_both(self, name: str) -> Run:
        """Start training, and wait until both workers train."""
        run = self._train(name)

        def both_train() -> bool:
            if run.process.poll() is not None:
                raise RuntimeError(f"training ended before the fault: {run.log.read_text()[-3000:]}")
            return all(self._cluster.trainers(number) for number in (1, 2))

        wait_until(both_train, lambda: f"both workers train: {run.log.read_text()[-3000:]}", every_s=0.1)
        time.sleep(0.5)  # into the job
        return run

    def _train(self, name: str) -> Run:
        log = self._folder / f"{name}.log"
        options = ["--registry", str(self._folder / name), "--config", str(self._config), "--json"]
        command = ["-m", "flawstream_cli", "train", str(self._folder / "data"), "--ray", self._cluster.address]
        return Run(self._cluster.run(sys.executable, *command, *options, log=log), log)

    def _repair(self, name: str) -> None:
        """Bring the cluster back to two workers."""
        left_s = self._struck_s + self._link_down_s - time.monotonic()
        if name == "link_down" and left_s > 0:
            time.sleep(left_s)
        if name in ("raylet_killed", "start_after_node_death"):
            self._cluster.start_worker(1)
        elif name == "link_down":  # by now Ray may have declared the node dead, and the node may end of itself
            self._cluster.kill_node(1)
            self._cluster.start_worker(1)

    def _versions(self, name: str) -> dict[str, object]:
        """Return what must be equal of each category's current version: the weights and the thresholds."""
        manifests, _ = Registry(str(self._folder / name)).current_manifests()
        return {one.category: (one.files[WEIGHTS_FILE], one.calibration) for one in manifests}

    def _readable(self, registry: Registry, category: str) -> int:
        """Count the versions of a category of which everything can be read."""
        count = 0
        for version in registry.versions(category):
            with contextlib.suppress(RegistryError):
                manifest = registry.manifest(category, version)
                for file in manifest.files:
                    registry.read_file(manifest, file)
                count += 1
        return count


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="chaos_training", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", help="separated by commas (default all)")
    parser.add_argument("--categories", type=int, default=8, help="(default 8)")
    parser.add_argument("--epochs", type=int, default=60, help="sets how long a job takes (default 60)")
    parser.add_argument("--folder", type=Path, help="keep data, logs and the undisturbed run there for another call")
    parser.add_argument("--link-down", type=float, default=120.0, help="seconds (default 120)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the cluster ends
    outcomes: dict[str, dict[str, object]] = {}
    failed = False
    with contextlib.ExitStack() as stack:
        folder = arguments.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flawstream-chaos-")))
        folder.mkdir(exist_ok=True)
        cluster = stack.enter_context(TrainingCluster(2, folder))
        chaos = Chaos(cluster, folder, arguments.categories, arguments.epochs, arguments.link_down)
        err.print(f"undisturbed: {chaos.run_undisturbed():.1f} s")
        for name in arguments.cases.split(",") if arguments.cases else chaos.cases:
            if name == "link_down" and not cluster.has_links:
                err.print("link_down: skipped, as network namespaces are not allowed here")
                continue
            outcome = chaos.run_case(name)
            outcomes[name] = vars(outcome)
            as_it_should_be = (0, arguments.categories, arguments.categories, 0, 0)
            found = (outcome.exit_code, outcome.trained, outcome.equal, outcome.doubled, outcome.half_written)
            missed = name in _MUST_RETRY and not outcome.retried
            wrong = found != as_it_should_be or outcome.late_s > _LATE_S or missed
            failed |= wrong
            err.print(f"{name}: {outcome}", style="red" if wrong else "", soft_wrap=True)
            if wrong:
                err.print((folder / f"{name}.log").read_text()[-3000:], markup=False)
    report = {
        "bench": "chaos-training",
        "categories": arguments.categories,
        "trained": min((int(str(one["trained"])) for one in outcomes.values()), default=0),
        "equal": min((int(str(one["equal"])) for one in outcomes.values()), default=0),
        "half_written": sum(int(str(one["half_written"])) for one in outcomes.values()),
        "cases": outcomes,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
