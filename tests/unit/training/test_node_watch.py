"""Detection of lost nodes, on real sockets."""

import socket
from collections.abc import Iterator

import pytest
from helpers.waiting import wait_until

import training.node_watch
from training.node_watch import NodeWatch
from training.placement import Node


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.node_watch, "_PROBE_S", 0.01)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def node(name: str, server: socket.socket) -> Node:
    return Node(name, name, server.getsockname(), {}, {})


def test_node_whose_raylet_is_gone_is_lost(listener: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as alive, NodeWatch() as watch:
        watch.watch([node("a", listener), node("b", alive)])
        listener.accept()[0].close()  # the first probe
        assert watch.lost() == set()
        listener.close()
        wait_until(lambda: watch.lost() == {"a"}, "the loss is noticed")
        watch.watch([node("b", alive)])
        assert watch.lost() == set()


def test_busy_node_is_not_lost(listener: socket.socket) -> None:
    """The kernel accepts connections for a process that is stopped or starved."""
    with NodeWatch() as watch:
        watch.watch([node("a", listener)])
        for _ in range(20):
            listener.accept()[0].close()
        assert watch.lost() == set()


def test_node_that_was_never_reached_is_not_judged(listener: socket.socket) -> None:
    unreachable = node("far", listener)
    listener.close()
    with socket.create_server(("127.0.0.1", 0)) as near, NodeWatch() as watch:
        watch.watch([unreachable, node("near", near)])
        for _ in range(10):
            near.accept()[0].close()
        assert watch.lost() == set()
