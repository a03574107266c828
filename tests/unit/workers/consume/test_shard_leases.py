"""Who reads which shard, decided by every worker for itself; no server and no clock."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.consume.shard_leases import MISSED_HEARTBEATS, ShardLeases, divide, shares

names = st.sets(st.text("abc-0123456789", min_size=1, max_size=6), min_size=1, max_size=24)


@given(names, st.integers(1, 40))
def test_every_shard_has_readers_and_every_worker_an_equal_share(workers: set[str], shards: int) -> None:
    read: Counter[int] = Counter()
    for worker in workers:
        mine = shares(workers, worker, shards)
        assert all(0 < share <= 1 for share in mine.values())
        assert sum(mine.values()) == pytest.approx(shards / len(workers))
        assert len(mine) <= shards / len(workers) + 2
        read.update(mine)
    for shard in range(shards):
        total = sum(shares(workers, worker, shards).get(shard, 0.0) for worker in workers)
        assert total == pytest.approx(1.0)


def test_three_workers_read_four_shards_as_the_page_says() -> None:
    found = {worker: shares({"a", "b", "c"}, worker, 4) for worker in "abc"}
    assert {worker: list(mine) for worker, mine in found.items()} == {"a": [0, 1], "b": [1, 2], "c": [2, 3]}
    assert found["b"] == {1: pytest.approx(2 / 3), 2: pytest.approx(2 / 3)}


@given(names, st.integers(1, 40), st.integers(1, 64))
def test_batches_in_flight_are_divided_and_every_shard_has_one(workers: set[str], shards: int, in_flight: int) -> None:
    mine = shares(workers, min(workers), shards)
    slots = divide(in_flight, mine)
    assert slots.keys() == mine.keys()
    assert min(slots.values()) >= 1
    assert sum(slots.values()) == max(in_flight, len(mine))


def test_larger_share_has_more_batches_in_flight() -> None:
    assert divide(3, {0: 1.0, 1: 1 / 3}) == {0: 2, 1: 1}
    assert divide(3, {0: 1.0}) == {0: 3}
    assert divide(3, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}) == {0: 1, 1: 1, 2: 1, 3: 1}


class Plant:
    """Workers around one hash of counters; one round is a heartbeat of every worker that runs."""

    def __init__(self, *workers: str, shards: int = 4) -> None:
        self.counters: dict[str, int] = {}
        self.leases = {name: ShardLeases(name, shards) for name in workers}
        self.shards = shards

    def beat(self, *workers: str) -> None:
        for name in workers:
            self.counters[name] = self.counters.get(name, 0) + 1
            for dead, counter in self.leases[name].dead.items():
                if self.counters.get(dead) == counter:
                    del self.counters[dead]
            self.leases[name].heard(self.counters)

    def read_by(self, *workers: str) -> set[int]:
        return {shard for name in workers for shard in self.leases[name].shares}


def test_first_worker_reads_everything_and_shares_it_with_the_next_at_once() -> None:
    plant = Plant("a", "b")
    plant.beat("a")
    assert list(plant.leases["a"].shares) == [0, 1, 2, 3]
    plant.beat("b", "a")
    assert list(plant.leases["a"].shares) == [0, 1]
    assert list(plant.leases["b"].shares) == [2, 3]


def test_shards_of_a_killed_worker_are_read_after_so_many_missed_heartbeats() -> None:
    plant = Plant("a", "b", "c")
    for _ in range(2):
        plant.beat("c", "a", "b")
    for _ in range(MISSED_HEARTBEATS - 1):
        plant.beat("a", "b")
        assert plant.read_by("a", "b") != {0, 1, 2, 3}
    assert plant.leases["a"].unread == {3}
    plant.beat("a", "b")
    assert plant.read_by("a", "b") == {0, 1, 2, 3}
    assert plant.leases["a"].unread == set()
    plant.beat("a")
    assert plant.counters.keys() == {"a", "b"}, "the dead worker's counter is deleted"


def test_shards_of_a_worker_that_leaves_are_read_at_the_next_heartbeat() -> None:
    plant = Plant("a", "b")
    plant.beat("a", "b", "a")
    del plant.counters["b"]
    plant.beat("a")
    assert list(plant.leases["a"].shares) == [0, 1, 2, 3]


def test_paused_worker_is_back_with_its_next_heartbeat_and_does_not_think_the_others_dead() -> None:
    plant = Plant("a", "b")
    plant.beat("a", "b", "a")
    for _ in range(3 * MISSED_HEARTBEATS):
        plant.beat("a")
    assert list(plant.leases["a"].shares) == [0, 1, 2, 3]
    plant.beat("b", "a")
    assert list(plant.leases["b"].shares) == [2, 3]
    assert list(plant.leases["a"].shares) == [0, 1]


def test_two_workers_of_one_name_read_the_same_shards() -> None:
    plant = Plant("a", "b")
    twin = ShardLeases("a", 4)
    plant.beat("a", "b", "a")
    plant.counters["a"] += 1
    twin.heard(plant.counters)
    assert list(twin.shares) == list(plant.leases["a"].shares) == [0, 1]


def test_worker_that_cannot_ask_reads_all_shards_and_shares_them_when_it_can_again() -> None:
    plant = Plant("a", "b")
    assert list(plant.leases["a"].shares) == [0, 1, 2, 3], "nothing is known yet"
    plant.beat("a", "b", "a")
    for missed in range(MISSED_HEARTBEATS):
        assert list(plant.leases["a"].shares) == [0, 1], missed
        plant.leases["a"].not_heard()
    assert list(plant.leases["a"].shares) == [0, 1, 2, 3]
    assert plant.leases["a"].unread == set()
    plant.beat("a")
    assert list(plant.leases["a"].shares) == [0, 1]


def test_counters_that_go_back_after_a_failover_are_heartbeats_too() -> None:
    plant = Plant("a", "b")
    for _ in range(5):
        plant.beat("a", "b")
    plant.counters = {"a": 1, "b": 1}
    for _ in range(2 * MISSED_HEARTBEATS):
        plant.beat("b", "a")
    assert plant.leases["a"].workers == ["a", "b"]


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["beat", "kill", "leave"])), max_size=60))
def test_whatever_happens_the_live_workers_read_every_shard_soon(events: list[tuple[str, str]]) -> None:
    plant = Plant(*"abcde")
    live: set[str] = set()
    for name, event in events:
        if event == "beat":
            live.add(name)
            plant.beat(name)
        elif event == "kill":
            live.discard(name)
            plant.leases[name] = ShardLeases(name, plant.shards)
        elif name in live:
            live.discard(name)
            plant.counters.pop(name, None)
    for _ in range(MISSED_HEARTBEATS + 1):
        plant.beat(*sorted(live))
    if live:
        assert plant.read_by(*live) == {0, 1, 2, 3}
        assert all(plant.leases[name].workers == sorted(live) for name in live)
