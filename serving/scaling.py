"""How many replicas there are to be: the policy, and the measurement it needs. Knows no Ray, no server and no clock.

`ArrivalPolicy` runs in Serve's controller. Serve pickles this module by value, since flawstream may not be installed
where the controller runs: it may only use itself and the standard library, and must never block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

IMAGES_WAITING = "images_waiting"
ARRIVALS_PER_S = "arrivals_per_s"
IMAGES_PER_S = "images_per_s"
"""Names of the numbers that replicas report: see `Load`."""

UTILISATION = 0.8
"""So much of what the replicas can do is to be asked of them."""
HYSTERESIS = 0.85
"""A replica is removed only if less than this fraction of `UTILISATION` is then asked of the others."""

_WINDOW_S = 1.0
_WARM_UP_S = 10.0
"""The first images of a replica are slow, and say nothing of the next."""
_LEAST_BUSY = 0.5
_NEWEST_WEIGHT = 0.3
"""Of the newest window in the moving average of what a replica can do."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a deployment's replicas, and what one of them can do.

    Attributes:
        waiting: Images on the streams that no worker has yet.
        arrivals_per_s: Images that producers push in a second, those that are refused included.
        images_per_s: What one replica makes in a second when it always has images; None until it is known.
    """

    waiting: float
    arrivals_per_s: float
    images_per_s: float | None


def wanted_replicas(current: int, load: Load, catch_up_s: float) -> int:
    """Return how many replicas are wanted, without bounds.

    Enough that what arrives, and what waits within `catch_up_s`, is `UTILISATION` of what they can do. More are wanted
    in one step, and fewer one at a time. As long as it is not known what a replica can do, none was ever busy, and
    their number is kept.

    Args:
        current: How many there are, or are starting.
        load: What is asked, and what one can do.
        catch_up_s: Time in which images that wait are to be done, beside those that arrive.
    """
    if not load.images_per_s:
        return current
    asked_per_s = load.arrivals_per_s + load.waiting / catch_up_s
    each_per_s = load.images_per_s * UTILISATION
    needed = math.ceil(asked_per_s / each_per_s)
    if needed > current:
        return needed
    if asked_per_s < (current - 1) * each_per_s * HYSTERESIS:
        return current - 1
    return current


class Context(Protocol):
    """What `ArrivalPolicy` reads of Serve's `AutoscalingContext`."""

    target_num_replicas: int
    raw_metrics: Mapping[str, Mapping[Any, Any]] | None
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    policy_state: dict[str, Any]


class ArrivalPolicy:
    """Serve's autoscaling policy: `wanted_replicas` of what the replicas have reported.

    Args:
        catch_up_s: Time in which images that wait are to be done.
    """

    def __init__(self, catch_up_s: float) -> None:
        self._catch_up_s = catch_up_s

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """Compute the target number of replicas; Serve calls this ten times a second.

        Args:
            context: Current state and metrics of the deployment.

        Returns:
            The number of replicas within the bounds, unchanged if no replica reports; and as state what one can do, so
            that it is still known when those that found out are gone.
        """
        current: int = context.target_num_replicas
        reports = context.raw_metrics or {}
        waiting, arrivals = _points(reports, IMAGES_WAITING), _points(reports, ARRIVALS_PER_S)
        rates = [max(series)[1] for series in _series(reports, IMAGES_PER_S)]
        known = context.policy_state.get(IMAGES_PER_S)
        rate = sum(rates) / len(rates) if rates else known
        wanted = current
        if waiting and arrivals:
            mean_arrivals = sum(value for _, value in arrivals) / len(arrivals)
            wanted = wanted_replicas(current, Load(max(waiting)[1], mean_arrivals, rate), self._catch_up_s)
        fewest, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(fewest, min(most, wanted)), {} if rate is None else {IMAGES_PER_S: rate}


def _series(reports: Mapping[str, Mapping[Any, Any]], name: str) -> list[list[tuple[float, float]]]:
    """Return the (time, value) points of each replica that reports a number; never an empty list of points."""
    found = [
        [(point.timestamp, point.value) for point in series if _is_number(point.value)]
        for series in reports.get(name, {}).values()
    ]
    return [points for points in found if points]


def _points(reports: Mapping[str, Mapping[Any, Any]], name: str) -> list[tuple[float, float]]:
    return [point for points in _series(reports, name) for point in points]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


@dataclass(frozen=True, slots=True)
class Reading:
    """What one replica sees at one moment.

    Attributes:
        at_s: When, on any clock that only goes forward.
        waiting: Images on the streams that no worker has yet.
        arrived: Images that have ever arrived; None where the server does not know.
        refused: Pushes that were ever refused.
        done: Images that this replica has done.
        busy_s: Seconds in which it has worked on any.
    """

    at_s: float
    waiting: int
    arrived: int | None
    refused: int
    done: int
    busy_s: float


class LoadMeter:
    """Makes of readings the numbers that a replica reports.

    What a replica can do is what it did while a second's images waited and it worked most of the time: then it was as
    fast as it can be, whatever held it back. Fewer wait for a moment in any plant, and small batches keep a detector
    busy: it would seem slow, and each replica added would make its batches smaller. A detector that idles because the
    workers are slow learns nothing from that.
    """

    def __init__(self) -> None:
        self._before: Reading | None = None
        self._first_done_s: float | None = None
        self._arrivals_per_s: float | None = None
        self._images_per_s: float | None = None

    def report(self, now: Reading) -> dict[str, float]:
        """Return the numbers to report, by name; those that are not known are left out."""
        if self._first_done_s is None and now.done:
            self._first_done_s = now.at_s
        before = self._before
        if before is None or now.at_s - before.at_s >= _WINDOW_S:
            self._before = now
            if before is not None:
                self._learn(before, now)
        found: dict[str, float] = {IMAGES_WAITING: now.waiting}
        if self._arrivals_per_s is not None:
            found[ARRIVALS_PER_S] = self._arrivals_per_s
        if self._images_per_s is not None:
            found[IMAGES_PER_S] = self._images_per_s
        return found

    def _learn(self, before: Reading, now: Reading) -> None:
        window_s = now.at_s - before.at_s
        if before.arrived is not None and now.arrived is not None:
            # counts go back where the server was emptied
            arrived = max(0, now.arrived - before.arrived) + max(0, now.refused - before.refused)
            self._arrivals_per_s = arrived / window_s
        is_warm = self._first_done_s is not None and before.at_s - self._first_done_s >= _WARM_UP_S
        done_per_s = (now.done - before.done) / window_s
        if not is_warm or not done_per_s:
            return
        had_images = min(before.waiting, now.waiting) >= done_per_s
        if had_images and (now.busy_s - before.busy_s) / window_s >= _LEAST_BUSY:
            known = self._images_per_s
            self._images_per_s = done_per_s if known is None else known + _NEWEST_WEIGHT * (done_per_s - known)
        elif self._images_per_s is not None:
            self._images_per_s = max(self._images_per_s, done_per_s)  # it has just shown that it can
