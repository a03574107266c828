"""Detection of nodes that the driver has lost, sooner than Ray does, which takes a minute for a link that is down."""

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from training.placement import Node

_PROBE_S = 1.0
_TIMEOUT_S = 2.0
_LOST_AFTER = 5
"""Failed probes, one after the other: 5 s where connections are refused, 15 s where nothing answers."""
_PROBES_AT_ONCE = 32


class NodeWatch:
    """Probes raylets by opening TCP connections, which the kernel accepts however busy the node is. A context manager.

    A node that never accepted one is not judged: the driver may be outside the cluster's network.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._failures: Counter[str] = Counter()
        self._reached: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._probe_until_stopped, name="node-watch", daemon=True)

    def watch(self, nodes: Iterable[Node]) -> None:
        """Watch these nodes, and no others."""
        self._nodes = {node.id: node for node in nodes}

    def lost(self) -> set[str]:
        """Return the ids of the watched nodes that no longer accept connections."""
        return {node for node in self._nodes if self._failures[node] >= _LOST_AFTER}

    def _probe_until_stopped(self) -> None:
        with ThreadPoolExecutor(_PROBES_AT_ONCE, thread_name_prefix="node-probe") as threads:
            while not self._stop.wait(_PROBE_S):
                nodes = list(self._nodes.values())
                for node, accepted in zip(nodes, threads.map(_accepts, nodes), strict=True):
                    if accepted:
                        self._reached.add(node.id)
                        del self._failures[node.id]
                    elif node.id in self._reached:
                        self._failures[node.id] += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def _accepts(node: Node) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(node.address, _TIMEOUT_S):
        return True
    return False
