"""A plant on a simulated clock: cameras, shards, stream workers, detectors and nodes, under the real policies.

`serving.scaling` decides how many workers and detectors there are, `workers.consume.shard_leases` who reads which
shard, `serving.routing` which detector takes a call. What is simulated is the work between their decisions.

Approximated:

- Images come in bundles, which stay together; the bundles of a shard come at random (Poisson).
- A worker is one queue: an image costs it the same, whatever the batch, and all of it before the detector is called.
- A detector's batch costs a constant and so much for each image. One batch runs at a time.
- The backlog that autoscaling reads, and the calls under way that routing reads, are those of the moment.
- Autoscaling decides once a second, where Serve does ten times.
- Images whose worker died are read again by others all together, and not one at a time.
- The network and the stream server take no time.
"""

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate, count
from typing import Any

from schemas.settings import Settings
from serving.autoscaling import DOWNSCALE_DELAY_S
from serving.routing import MOST_OF_MEAN, MOST_OF_MEAN_WITH_MODELS, Placement, choose, replicas_of, split
from serving.scaling import ArrivalPolicy, LoadMeter, Reading
from workers.consume.shard_leases import HEARTBEAT_S, ShardLeases, divide

REPORT_S = 1.0
LOOK_BACK_S = 10.0
"""As `serving.autoscaling` has them."""
_RETRY_S = 0.1
_HEARTBEATS_PER_CLAIM = 3

Load = Callable[[float], float]
"""Images a second that all cameras push, at a time in seconds."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What things take, in seconds.

    Attributes:
        worker_image_s: A worker's time for an image, from the read to the publication, without the detector's.
        batch_s: A detector's time for a batch, however small.
        image_s: What each image of a batch adds.
        load_s: Loading a category's version.
        start_s: From the decision to start a replica until it works.
        replica_noticed_s: From the death of a replica's process until Serve replaces it.
        node_noticed_s: From the death of a node until its replicas are known to be dead.
    """

    worker_image_s: float
    batch_s: float
    image_s: float
    load_s: float
    start_s: float
    replica_noticed_s: float
    node_noticed_s: float


@dataclass(frozen=True, slots=True)
class Layout:
    """What a plant consists of.

    Attributes:
        load: Images a second that all cameras push.
        nodes: Servers for workers and detectors.
        workers_a_node: Most workers on one.
        detectors_a_node: Most detectors on one.
        workers: Workers at the start.
        detectors: Detectors at the start.
        bundle: Images that come together.
        categories: How many there are.
        hot_categories: The first of them, which make `hot_share` of the images; all others are equally frequent.
        hot_share: Share of the images that is of hot categories.
        resident: Categories that fit into a detector.
    """

    load: Load
    nodes: int
    workers_a_node: int
    detectors_a_node: int
    workers: int
    detectors: int
    bundle: int = 32
    categories: int = 1
    hot_categories: int = 0
    hot_share: float = 0.0
    resident: int = 1


@dataclass(eq=False, slots=True)
class _Batch:
    """Images that a worker has read from a shard.

    Attributes:
        worker: Who has read it.
        shard: Where from.
        pushed_s: Of each bundle, when it was pushed.
        calls: Calls of detectors that have not been answered.
    """

    worker: "_Worker"
    shard: "_Shard"
    pushed_s: list[float]
    calls: int = 0


@dataclass(eq=False, slots=True)
class _Call:
    batch: _Batch
    images: int
    categories: list[str]


@dataclass(eq=False, slots=True)
class _Shard:
    """A shard: bundles that wait, bundles that are pending, and workers whose read waits for a bundle."""

    number: int
    waiting: deque[float] = field(default_factory=deque)
    pending: int = 0
    blocked: deque["_Worker"] = field(default_factory=deque)
    readers: int = 0
    unread_since_s: float | None = 0.0
    held: list[float] = field(default_factory=list)
    """Pushes that cameras could not make as the server was away."""
    unpublished: list[_Batch] = field(default_factory=list)
    is_away: bool = False


@dataclass(eq=False, slots=True)
class _Replica:
    """A worker or a detector."""

    name: str
    node: int
    rank: int
    is_alive: bool = True
    is_ready: bool = False
    meter: LoadMeter = field(default_factory=LoadMeter)
    reports: deque[tuple[float, dict[str, float]]] = field(default_factory=deque)
    done: int = 0


@dataclass(eq=False, slots=True)
class _Worker(_Replica):
    leases: ShardLeases | None = None
    slots: dict[int, int] = field(default_factory=dict)
    in_flight: Counter[int] = field(default_factory=Counter)
    batches: set[_Batch] = field(default_factory=set)
    reading: set[int] = field(default_factory=set)
    """Shards at which a read waits."""
    free_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Detector(_Replica):
    is_listed: bool = True
    """Whether callers still believe that it lives."""
    calls: int = 0
    queue: deque[_Call] = field(default_factory=deque)
    queued: int = 0
    running: list[_Call] = field(default_factory=list)
    stuck: list[_Call] = field(default_factory=list)
    busy_s: float = 0.0
    busy_since_s: float = 0.0
    resident: OrderedDict[str, None] = field(default_factory=OrderedDict)
    loaded_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Point:
    timestamp: float
    value: float


@dataclass(slots=True)
class _Context:
    """What `ArrivalPolicy` reads of Serve."""

    target_num_replicas: int
    raw_metrics: Mapping[str, Mapping[Any, Any]] | None
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    policy_state: dict[str, Any]


class _Deployment:
    """The target number of a deployment's replicas: the policy, and Serve's delay before one is removed."""

    def __init__(self, target: int, fewest: int, most: int, catch_up_s: float) -> None:
        self.target = target
        self._fewest = fewest
        self._most = most
        self._policy = ArrivalPolicy(catch_up_s)
        self._state: dict[str, Any] = {}
        self._fewer_since_s: float | None = None

    def decide(self, now_s: float, replicas: Sequence[_Replica]) -> None:
        """Set the target from what replicas have reported lately."""
        metrics: dict[str, dict[str, list[_Point]]] = {}
        for replica in replicas:
            for at_s, report in replica.reports:
                for name, value in report.items():
                    metrics.setdefault(name, {}).setdefault(replica.name, []).append(_Point(at_s, value))
        context = _Context(self.target, metrics, self._fewest, self._most, self._state)
        wanted, self._state = self._policy(context)
        if wanted >= self.target:
            self._fewer_since_s = None
            self.target = wanted
        elif self._fewer_since_s is None:
            self._fewer_since_s = now_s
        elif now_s - self._fewer_since_s >= DOWNSCALE_DELAY_S:
            self._fewer_since_s = None
            self.target = wanted


class Plant:
    """Simulates a plant. Two with the same arguments do the same.

    Args:
        layout: What there is.
        settings: The service's: batches, slots, bounds of the backlog, replicas.
        costs: What things take.
        seed: Of all that is random.

    Attributes:
        pushed: Images that cameras have pushed, those that wait for a server that is away not included.
        refused: Of these, how many were refused.
        loads: Versions that detectors have loaded.
        completed: (time, seconds since the push) of each bundle with results.
        replicas: (time, workers, detectors) that work, once a second.
        backlog: (time, images that wait, images refused so far), once a second.
        longest_unread_s: Longest time that a shard was without a reader.
    """

    def __init__(self, layout: Layout, settings: Settings, costs: Costs, seed: int) -> None:
        self.now_s = 0.0
        self.pushed = self.refused = self.loads = 0
        self.completed: list[tuple[float, float]] = []
        self.replicas: list[tuple[float, int, int]] = []
        self.backlog: list[tuple[float, int, int]] = []
        self.longest_unread_s = 0.0
        self._layout, self._settings, self._costs = layout, settings, costs
        self._random = random.Random(seed)  # noqa: S311 - not for secrets
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._bundles_a_batch = max(1, settings.worker.batch_size // layout.bundle)
        self._max_images = settings.backlog.max_images
        self._shards = [_Shard(number) for number in range(max(1, settings.redis.shards))]
        self._counters: dict[str, int] = {}
        self._arrived = 0
        self._workers: list[_Worker] = []
        self._detectors: list[_Detector] = []
        self._started = count()
        self._dead_nodes: set[int] = set()
        self._names = [f"part-{number:04}" for number in range(layout.categories)]
        self._random.shuffle(self._names)  # the hot ones are anywhere among them
        weights = [1.0] * layout.categories
        if layout.hot_categories:
            weights = [layout.hot_share / layout.hot_categories] * layout.hot_categories
            cold = layout.categories - layout.hot_categories
            weights += [(1 - layout.hot_share) / cold] * cold
        self._weights = list(accumulate(weights))
        self._worker_scale = _deployment(layout.workers, settings.worker)
        self._detector_scale = _deployment(layout.detectors, settings.detector)
        for _ in range(layout.detectors):
            self._start_detector(0.0)
        for _ in range(layout.workers):
            self._start_worker(0.0)
        for shard in self._shards:
            self._schedule_push(shard)
        self.at(REPORT_S, self._report)

    def at(self, time_s: float, do: Callable[[], None]) -> None:
        """Have something done at a time."""
        heappush(self._events, (time_s, next(self._order), do))

    def run(self, until_s: float) -> None:
        """Simulate until a time."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, do = heappop(self._events)
            do()
        self.now_s = until_s
        for shard in self._shards:
            self._count_unread(shard)

    @property
    def unfinished(self) -> int:
        """Images that are on the streams: waiting or pending."""
        return sum(len(shard.waiting) + shard.pending for shard in self._shards) * self._layout.bundle

    # Faults

    def kill_worker_of(self, shard: int) -> None:
        """Kill the process of a worker that reads a shard."""
        victim = next(worker for worker in self._workers if worker.is_alive and shard in worker.slots)
        self._lose_worker(victim)
        self.at(self.now_s + self._costs.replica_noticed_s, lambda: self._replace_worker(victim))

    def kill_node(self, node: int) -> None:
        """Kill a node with all that runs on it, for good."""
        self._dead_nodes.add(node)
        workers = [worker for worker in self._workers if worker.node == node]
        detectors = [detector for detector in self._detectors if detector.node == node]
        for worker in workers:
            self._lose_worker(worker)
        for detector in detectors:
            detector.is_alive = False
            detector.stuck += [*detector.running, *detector.queue]
            detector.running, detector.queue, detector.queued = [], deque(), 0

        def notice() -> None:
            for detector in detectors:
                self._delist(detector)
            for worker in workers:
                self._workers.remove(worker)
            self._follow_targets()

        self.at(self.now_s + self._costs.node_noticed_s, notice)

    def stop_server(self, shard: int, seconds: float) -> None:
        """Stop the stream server of a shard for some time; cameras push again once it is back."""
        stopped = self._shards[shard]
        stopped.is_away = True

        def is_back() -> None:
            stopped.is_away = False
            for pushed_s in stopped.held:
                self._admit(stopped, pushed_s)
            stopped.held.clear()
            for batch in stopped.unpublished:
                self._publish(batch)
            stopped.unpublished.clear()
            for worker in self._workers:
                self._read(worker, stopped)

        self.at(self.now_s + seconds, is_back)

    # Cameras

    def _schedule_push(self, shard: _Shard) -> None:
        bundles_a_s = max(1e-9, self._layout.load(self.now_s)) / self._layout.bundle / len(self._shards)
        self.at(self.now_s + self._random.expovariate(bundles_a_s), lambda: self._push(shard))

    def _push(self, shard: _Shard) -> None:
        if shard.is_away:
            shard.held.append(self.now_s)
        else:
            self._admit(shard, self.now_s)
        self._schedule_push(shard)

    def _admit(self, shard: _Shard, pushed_s: float) -> None:
        images = self._layout.bundle
        self.pushed += images
        if (len(shard.waiting) + shard.pending + 1) * images > self._max_images:
            self.refused += images
            return
        self._arrived += images
        shard.waiting.append(pushed_s)
        while shard.waiting and shard.blocked:
            worker = shard.blocked.popleft()
            worker.reading.discard(shard.number)
            self._read(worker, shard)

    # Stream workers

    def _read(self, worker: _Worker, shard: _Shard) -> None:
        """Have a worker read a shard as long as it has free slots for it."""
        number = shard.number
        while (
            worker.is_alive
            and not shard.is_away
            and number not in worker.reading
            and worker.in_flight[number] < worker.slots.get(number, 0)
        ):
            if not shard.waiting:
                worker.reading.add(number)
                shard.blocked.append(worker)
                return
            bundles = [shard.waiting.popleft() for _ in range(min(self._bundles_a_batch, len(shard.waiting)))]
            shard.pending += len(bundles)
            worker.in_flight[number] += 1
            batch = _Batch(worker, shard, bundles)
            worker.batches.add(batch)
            images = len(bundles) * self._layout.bundle
            worker.free_s = max(worker.free_s, self.now_s) + images * self._costs.worker_image_s
            self.at(worker.free_s, lambda batch=batch: self._detect(batch))  # type: ignore[misc]  # bound now

    def _detect(self, batch: _Batch) -> None:
        """Call the detectors for a batch."""
        if not batch.worker.is_alive:
            return
        images = len(batch.pushed_s) * self._layout.bundle
        categories = self._names * images  # of the only one
        if len(self._names) > 1:
            categories = self._random.choices(self._names, cum_weights=self._weights, k=images)
        calls = split(categories, Placement(frozenset(self._listed()), self._fits))
        batch.calls = len(calls)
        for rows in calls:
            self._call(_Call(batch, len(rows), [categories[row] for row in rows]))

    @property
    def _fits(self) -> bool:
        return self._layout.categories <= self._layout.resident

    def _listed(self) -> dict[str, _Detector]:
        return {one.name: one for one in self._detectors if one.is_ready and one.is_listed}

    def _call(self, call: _Call) -> None:
        """Send a call to the detector that routing chooses; try again where there is none, or its queue is full."""
        if not call.batch.worker.is_alive:
            return
        listed = self._listed()
        if not listed:
            self.at(self.now_s + _RETRY_S, lambda: self._call(call))
            return
        if self._fits:
            here, pick = call.batch.worker.node, self._random.random
            ranking = sorted(listed, key=lambda name: pick() + (listed[name].node != here))  # local ones first
            bound = MOST_OF_MEAN
        else:
            ranking, bound = list(replicas_of(call.categories[0], listed)), MOST_OF_MEAN_WITH_MODELS
        detector = listed[choose(ranking, {name: one.calls for name, one in listed.items()}, bound)[0]]
        if detector.queue and detector.queued + call.images > self._settings.detector.max_queue_images:
            self.at(self.now_s + _RETRY_S, lambda: self._call(call))
            return
        detector.calls += 1
        if not detector.is_alive:
            detector.stuck.append(call)
            return
        if self._fits:
            self._enqueue(detector, call)
            return
        absent = [name for name in dict.fromkeys(call.categories) if name not in detector.resident]
        for name in dict.fromkeys(call.categories):
            detector.resident[name] = None
            detector.resident.move_to_end(name)
        while len(detector.resident) > self._layout.resident:
            detector.resident.popitem(last=False)
        if absent:  # one at a time; batches of loaded categories go on meanwhile
            self.loads += len(absent)
            detector.loaded_s = max(detector.loaded_s, self.now_s) + len(absent) * self._costs.load_s
            self.at(detector.loaded_s, lambda: self._enqueue(detector, call))
        else:
            self._enqueue(detector, call)

    def _publish(self, batch: _Batch) -> None:
        """Complete a batch, and read the next one."""
        worker, shard = batch.worker, batch.shard
        if not worker.is_alive:
            return
        if shard.is_away:
            shard.unpublished.append(batch)
            return
        shard.pending -= len(batch.pushed_s)
        self.completed += [(self.now_s, self.now_s - pushed_s) for pushed_s in batch.pushed_s]
        worker.done += len(batch.pushed_s) * self._layout.bundle
        worker.batches.discard(batch)
        worker.in_flight[shard.number] -= 1
        self._read(worker, shard)

    # Detectors

    def _enqueue(self, detector: _Detector, call: _Call) -> None:
        if not detector.is_alive:
            detector.stuck.append(call)
            return
        detector.queue.append(call)
        detector.queued += call.images
        if not detector.running:
            self._run_batch(detector)

    def _run_batch(self, detector: _Detector) -> None:
        """Start a batch of whole calls, at least one; the real one divides calls."""
        images = 0
        most = self._settings.detector.max_batch_images
        while detector.queue and (not detector.running or images + detector.queue[0].images <= most):
            call = detector.queue.popleft()
            images += call.images
            detector.running.append(call)
        detector.queued -= images
        detector.busy_since_s = self.now_s
        took_s = self._costs.batch_s + images * self._costs.image_s
        self.at(self.now_s + took_s, lambda: self._end_batch(detector, images))

    def _end_batch(self, detector: _Detector, images: int) -> None:
        if not detector.is_alive:
            return
        calls, detector.running = detector.running, []
        detector.done += images
        detector.busy_s += self.now_s - detector.busy_since_s
        detector.calls -= len(calls)
        if detector.queue:
            self._run_batch(detector)
        for call in calls:
            call.batch.calls -= 1
            if not call.batch.calls:
                self._publish(call.batch)

    def _delist(self, detector: _Detector) -> None:
        """Take note that a detector is dead: calls that it had are made again."""
        detector.is_listed = False
        self._detectors.remove(detector)
        for call in detector.stuck:
            self._call(call)

    # Replicas

    def _start_detector(self, after_s: float) -> None:
        node = self._emptiest_node(self._detectors, self._layout.detectors_a_node)
        if node is None:
            return
        detector = _Detector(f"detector-{next(self._started)}", node, 0)
        self._detectors.append(detector)
        if not self._fits:  # loaded before it is ready
            detector.resident.update(dict.fromkeys(sorted(self._names)[: self._layout.resident]))
        self._have_ready(detector, after_s, lambda: None)

    def _start_worker(self, after_s: float, rank: int | None = None, node: int | None = None) -> None:
        if node is None:
            node = self._emptiest_node(self._workers, self._layout.workers_a_node)
        if node is None:
            return
        if rank is None:
            taken = {worker.rank for worker in self._workers}
            rank = next(number for number in count() if number not in taken)
        worker = _Worker(f"node-{node}-{rank}", node, rank)
        worker.leases = ShardLeases(worker.name, len(self._shards))
        self._workers.append(worker)
        self._have_ready(worker, after_s, lambda: self._heartbeat(worker))

    def _have_ready(self, replica: _Replica, after_s: float, begin: Callable[[], None]) -> None:
        def is_ready() -> None:
            if replica.is_alive:
                replica.is_ready = True
                begin()

        self.at(self.now_s + after_s + self._random.uniform(0, HEARTBEAT_S), is_ready)

    def _emptiest_node(self, replicas: Sequence[_Replica], most: int) -> int | None:
        """Return the node that has fewest of some replicas; None where all are full."""
        taken = Counter(one.node for one in replicas)
        nodes = [node for node in range(self._layout.nodes) if node not in self._dead_nodes and taken[node] < most]
        return min(nodes, key=lambda node: taken[node], default=None)

    def _lose_worker(self, worker: _Worker) -> None:
        """Kill a worker. What it has read is read again when its entries may be claimed."""
        worker.is_alive = False
        for number in worker.slots:
            self._set_reader(number, -1)
        worker.slots = {}
        claim_s = self._settings.worker.claim_idle_ms / 1000
        # since the last heartbeat for its entries
        idle_s = self._random.uniform(0, claim_s / _HEARTBEATS_PER_CLAIM)
        swept_s = self._random.uniform(0, self._settings.worker.sweep_s)
        self.at(self.now_s + claim_s - idle_s + swept_s, lambda: self._release(worker))

    def _replace_worker(self, worker: _Worker) -> None:
        """Start a worker of the same name, which has what was pending for it at once."""
        self._workers.remove(worker)
        self._start_worker(self._costs.start_s, worker.rank, worker.node)
        self.at(self.now_s + self._costs.start_s, lambda: self._release(worker))

    def _release(self, worker: _Worker) -> None:
        """Let what a worker has read, and not completed, be read again, the oldest first."""
        for batch in worker.batches:
            batch.shard.pending -= len(batch.pushed_s)
            batch.shard.waiting.extendleft(reversed(batch.pushed_s))
        for shard in {batch.shard.number: batch.shard for batch in worker.batches}.values():
            for other in self._workers:
                self._read(other, shard)
        worker.batches.clear()

    def _follow_targets(self) -> None:
        """Start and stop replicas, so that they are as many as they are to be."""
        for _ in range(self._detector_scale.target - len(self._detectors)):
            self._start_detector(self._costs.start_s)
        for _ in range(self._worker_scale.target - len(self._workers)):
            self._start_worker(self._costs.start_s)
        for _ in range(len(self._workers) - self._worker_scale.target):
            self._stop_worker(self._workers[-1])
        for _ in range(len(self._detectors) - self._detector_scale.target):
            self._detectors.pop().is_listed = False  # what it has is finished first

    def _stop_worker(self, worker: _Worker) -> None:
        """Take a worker's shards away; it finishes what it has read."""
        self._workers.remove(worker)
        for number in worker.slots:
            self._set_reader(number, -1)
        worker.slots = {}
        self._counters.pop(worker.name, None)
        worker.leases = None

    # Shard leases

    def _heartbeat(self, worker: _Worker) -> None:
        leases = worker.leases
        if not worker.is_alive or leases is None:
            return
        if self._shards[0].is_away:
            leases.not_heard()
        else:
            for name, counter in leases.dead.items():
                if self._counters.get(name) == counter:
                    del self._counters[name]
            self._counters[worker.name] = self._counters.get(worker.name, 0) + 1
            leases.heard(self._counters)
        slots = divide(self._settings.worker.in_flight, leases.shares)
        if slots != worker.slots:
            before, worker.slots = worker.slots, slots
            for number in slots.keys() - before.keys():
                self._set_reader(number, 1)
            for number in before.keys() - slots.keys():
                self._set_reader(number, -1)
            for number in slots:
                self._read(worker, self._shards[number])
        self.at(self.now_s + HEARTBEAT_S, lambda: self._heartbeat(worker))

    def _set_reader(self, number: int, change: int) -> None:
        shard = self._shards[number]
        self._count_unread(shard)
        shard.readers += change
        if shard.readers:
            shard.unread_since_s = None
        elif shard.unread_since_s is None:
            shard.unread_since_s = self.now_s

    def _count_unread(self, shard: _Shard) -> None:
        if shard.unread_since_s is not None:
            self.longest_unread_s = max(self.longest_unread_s, self.now_s - shard.unread_since_s)

    # Autoscaling

    def _report(self) -> None:
        """Have every replica report, and the number of replicas decided."""
        now_s = self.now_s
        bundle = self._layout.bundle
        waiting = sum(len(shard.waiting) for shard in self._shards) * bundle
        if not any(shard.is_away for shard in self._shards):
            for worker in self._workers:
                self._take_report(worker, Reading(now_s, waiting, self._arrived, self.refused, worker.done, now_s))
            for one in self._detectors:
                busy_s = one.busy_s + (now_s - one.busy_since_s if one.running else 0.0)
                self._take_report(one, Reading(now_s, waiting, self._arrived, self.refused, one.done, busy_s))
        self._worker_scale.decide(now_s, [one for one in self._workers if one.is_alive])
        self._detector_scale.decide(now_s, [one for one in self._detectors if one.is_alive])
        self._follow_targets()
        workers, detectors = (
            sum(one.is_ready and one.is_alive for one in group) for group in (self._workers, self._detectors)
        )
        self.replicas.append((now_s, workers, detectors))
        self.backlog.append((now_s, waiting, self.refused))
        self.at(now_s + REPORT_S, self._report)

    def _take_report(self, replica: _Replica, reading: Reading) -> None:
        if not (replica.is_alive and replica.is_ready):
            return
        replica.reports.append((reading.at_s, replica.meter.report(reading)))
        while replica.reports[0][0] < reading.at_s - LOOK_BACK_S:
            replica.reports.popleft()


def _deployment(replicas: int, section: Any) -> _Deployment:
    most = section.max_replicas or section.replicas
    return _Deployment(replicas, section.replicas, most, section.catch_up_s)
