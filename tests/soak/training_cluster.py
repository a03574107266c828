"""A Ray cluster of a head without CPUs and workers of one CPU, each with its own network where the system allows it.

Root on Linux gets a network namespace for each node, joined by a bridge in that of the head, so that a link can be
taken down. Elsewhere the nodes are processes on one address, and links cannot be taken down.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from helpers.command_line import clean_environment
from helpers.waiting import wait_until

from workers.redis.embedded import free_port

_START_S = 120.0
_NETWORK = "10.77.0"
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
}


def namespaces_are_allowed() -> bool:
    """Whether this process may create network namespaces."""
    if shutil.which("ip") is None:
        return False
    name = f"fs{os.getpid()}try"
    created = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0  # noqa: S603, S607 - fixed
    if created:
        subprocess.run(["ip", "netns", "del", name], check=True)  # noqa: S603, S607 - fixed
    return created


class TrainingCluster:
    """A cluster for chaos. A context manager.

    Args:
        workers: Number of workers.
        folder: For logs.

    Attributes:
        address: The head's, for `--ray`.
        has_links: Whether links can be taken down.
    """

    def __init__(self, workers: int, folder: Path) -> None:
        self.has_links = namespaces_are_allowed()
        self._folder = folder
        self._prefix = f"fs{os.getpid()}"
        self._temporary = Path(tempfile.mkdtemp(prefix="fs", dir="/tmp"))
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._programs: list[subprocess.Popen[bytes]] = []
        self._count = workers
        self.address = f"{self._ip(0)}:{free_port()}"

    def run(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a program on the head; its standard output is a pipe, its standard error goes to the log."""
        self._programs.append(self._start(0, command, log=log, stdout=subprocess.PIPE))
        return self._programs[-1]

    def start_worker(self, number: int) -> None:
        """Start a worker, from 1, and wait until it has joined: two that start at once take the same socket's name."""
        self._nodes[number] = self._start(
            number,
            ["ray", "start", f"--address={self.address}", "--num-cpus=1", *self._common(number)],
            log=self._folder / f"worker{number}.log",
        )
        wait_until(lambda: self._is_up(number), f"worker {number} starts", deadline_s=_START_S)

    def kill_node(self, number: int) -> None:
        """Kill a node's raylet, if it still runs, and wait until the trainers that it started have ended."""
        started = _descendants(self._nodes[number].pid)
        for pid in self._raylets(number):
            os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: not any(_command(pid).startswith("ray::train") for pid in started), "the node's trainers end"
        )
        self._end(number, started)

    def trainers(self, number: int) -> list[int]:
        """List the processes of a node that train a category now."""
        return [
            pid
            for raylet in self._raylets(number)
            for pid in _descendants(raylet)
            if _command(pid).startswith("ray::train part")
        ]

    def _raylets(self, number: int) -> list[int]:
        """Return the raylet of a node; none if it has ended."""
        started = _descendants(self._nodes[number].pid)
        return [pid for pid in started if _command(pid).partition(" ")[0].endswith("/raylet")]

    def set_link(self, number: int, *, up: bool) -> None:
        """Take the link of a worker down, or up again."""
        _ip("-n", self._namespace(0), "link", "set", self._link(number), "up" if up else "down")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            self._open()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _open(self) -> None:
        if self.has_links:
            self._make_networks()
        head = ["ray", "start", "--head", "--num-cpus=0", f"--port={self.address.rpartition(':')[2]}"]
        head += ["--include-dashboard=false", f"--temp-dir={self._temporary}"]
        self._nodes[0] = self._start(0, [*head, *self._common(0)], log=self._folder / "head.log")
        wait_until(lambda: self._is_up(0), "the head starts", deadline_s=_START_S)
        for number in range(1, self._count + 1):
            self.start_worker(number)

    def _close(self) -> None:
        for program in self._programs:
            program.kill()
        for number in sorted(self._nodes, reverse=True):
            self._end(number)
        if self.has_links:
            for number in range(self._count + 1):
                with contextlib.suppress(subprocess.CalledProcessError):  # not all were created
                    _ip("netns", "del", self._namespace(number))
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _common(self, number: int) -> list[str]:
        return [
            "--block",
            f"--node-ip-address={self._ip(number)}",
            f"--object-store-memory={100_000_000}",
            f"--memory={4_000_000_000}",
            "--disable-usage-stats",
        ]

    def _is_up(self, number: int) -> bool:
        process = self._nodes[number]
        log = self._folder / ("head.log" if number == 0 else f"worker{number}.log")
        if process.poll() is not None:
            raise RuntimeError(f"{log.name} ended: {log.read_text()[-2000:]}")
        return "Ray runtime started" in log.read_text()

    def _end(self, number: int, started: Sequence[int] = ()) -> None:
        """End what is left of a node, also of processes that it started and whose parent has ended."""
        process = self._nodes[number]
        for pid in {*started, *_descendants(process.pid), process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def _start(
        self, number: int, command: Sequence[str], *, log: Path, stdout: int | None = None
    ) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", self._namespace(number)] if self.has_links else []
        program = command[0] if command[0].startswith("/") else str(Path(sys.executable).with_name(command[0]))
        with log.open("wb") as file:
            return subprocess.Popen(  # noqa: S603 - our own programs
                [*inside, program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=stdout if stdout is not None else file,
                stderr=file,
                env=clean_environment() | _ENVIRONMENT,
                start_new_session=True,
            )

    def _make_networks(self) -> None:
        """Create a namespace a node, and a bridge in that of the head."""
        head = self._namespace(0)
        for number in range(self._count + 1):
            _ip("netns", "add", self._namespace(number))
            _ip("-n", self._namespace(number), "link", "set", "lo", "up")
        _ip("-n", head, "link", "add", "bridge", "type", "bridge")
        _ip("-n", head, "addr", "add", f"{self._ip(0)}/24", "dev", "bridge")
        _ip("-n", head, "link", "set", "bridge", "up")
        for number in range(1, self._count + 1):
            worker = self._namespace(number)
            _ip("-n", head, "link", "add", self._link(number), "type", "veth", "peer", "name", "eth0", "netns", worker)
            _ip("-n", head, "link", "set", self._link(number), "master", "bridge")
            _ip("-n", head, "link", "set", self._link(number), "up")
            _ip("-n", worker, "addr", "add", f"{self._ip(number)}/24", "dev", "eth0")
            _ip("-n", worker, "link", "set", "eth0", "up")

    def _ip(self, number: int) -> str:
        return f"{_NETWORK}.{number + 1}" if self.has_links else "127.0.0.1"

    def _namespace(self, number: int) -> str:
        return f"{self._prefix}n{number}"

    def _link(self, number: int) -> str:
        return f"worker{number}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)  # noqa: S603, S607 - our own arguments


def _descendants(pid: int) -> list[int]:
    """List the processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def _command(pid: int) -> str:
    """Return a process's command line; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    return ""
