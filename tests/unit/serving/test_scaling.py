"""How many replicas there are to be, decided as Serve has it decided; no cluster and no clock."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingContext

from schemas.errors import ConfigError
from schemas.settings import DetectorSettings, WorkerSettings
from serving.autoscaling import autoscaling_config
from serving.scaling import (
    ARRIVALS_PER_S,
    IMAGES_PER_S,
    IMAGES_WAITING,
    UTILISATION,
    ArrivalPolicy,
    Load,
    LoadMeter,
    Reading,
    wanted_replicas,
)

CATCH_UP_S = 60.0
RATE = 50.0
DEPLOYMENT = DeploymentID("StreamWorker", "flawstream")

Reports = dict[str, list[list[tuple[float, Any]]]]


def context(
    metrics: Reports | None, now: int, *, lowest: int = 1, highest: int = 8, state: dict[str, Any] | None = None
) -> AutoscalingContext:
    """Make a context: for each metric the reports of each replica, as (time, value)."""
    raw: Any = (
        None
        if metrics is None
        else {
            name: {
                ReplicaID(str(number), DEPLOYMENT): [TimeStampedValue(time, value) for time, value in series]
                for number, series in enumerate(reports)
            }
            for name, reports in metrics.items()
        }
    )
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name=DEPLOYMENT.name,
        app_name=DEPLOYMENT.app_name,
        current_num_replicas=now,
        target_num_replicas=now,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=None,
        aggregated_metrics=None,
        raw_metrics=raw,
        capacity_adjusted_min_replicas=lowest,
        capacity_adjusted_max_replicas=highest,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=100.0,
        config=None,
    )


def reports(waiting: Any, arrivals: Any, rate: Any = RATE) -> Reports:
    return {IMAGES_WAITING: [[(1.0, waiting)]], ARRIVALS_PER_S: [[(1.0, arrivals)]], IMAGES_PER_S: [[(1.0, rate)]]}


def decide(metrics: Reports | None, now: int, **bounds: Any) -> int:
    return ArrivalPolicy(CATCH_UP_S)(context(metrics, now, **bounds))[0]


@pytest.mark.parametrize(
    ("waiting", "arrivals", "now", "wanted"),
    [
        (0, 0, 1, 1),
        (0, 40, 1, 1),
        (0, 41, 1, 2),
        (0, 320, 1, 8),
        (0, 300, 8, 8),
        (1200, 40, 1, 2),
        (0, 81, 3, 3),
        (0, 68, 3, 3),
        (0, 67, 3, 2),
        (0, 0, 8, 7),
    ],
)
def test_more_are_wanted_at_once_and_fewer_one_by_one_with_room_to_spare(
    waiting: int, arrivals: int, now: int, wanted: int
) -> None:
    assert decide(reports(waiting, arrivals), now) == wanted


@given(
    waiting=st.integers() | st.floats() | st.none() | st.text(),
    arrivals=st.integers() | st.floats() | st.none(),
    rate=st.integers() | st.floats() | st.none(),
    now=st.integers(0, 200),
    bounds=st.tuples(st.integers(1, 50), st.integers(0, 50)),
)
def test_result_is_within_the_bounds_whatever_is_reported(
    waiting: Any, arrivals: Any, rate: Any, now: int, bounds: tuple[int, int]
) -> None:
    lowest, more = bounds
    wanted = decide(reports(waiting, arrivals, rate), now, lowest=lowest, highest=lowest + more)
    assert lowest <= wanted <= lowest + more


@given(st.none() | st.floats(max_value=-1) | st.just(math.nan) | st.just(math.inf), st.integers(1, 8))
def test_what_is_no_number_keeps_the_number_of_replicas(value: Any, now: int) -> None:
    assert decide(reports(value, 1000), now) == now
    assert decide(reports(1000, value), now) == now
    assert decide(reports(1000, 1000, value), now) == now


@pytest.mark.parametrize("metrics", [None, {}, {IMAGES_WAITING: []}, {IMAGES_WAITING: [[], []]}, {"other": [[(1, 0)]]}])
def test_where_nobody_reports_the_number_is_kept(metrics: Any) -> None:
    assert decide(metrics, 5) == 5


def test_newest_backlog_counts_and_arrivals_are_averaged_over_all_reports() -> None:
    metrics = reports(0, 0)
    metrics[ARRIVALS_PER_S] = [[(1.0, 0), (2.0, 160)], [(1.5, 0), (2.5, 160)], [(3.0, None)]]
    assert decide(metrics, 1) == 2
    metrics[IMAGES_WAITING] = [[(1.0, 90_000), (5.0, 0)], [(6.0, 4_800), (2.0, 0)]]
    assert decide(metrics, 1) == 4


def test_replicas_are_measured_each_and_what_they_can_do_is_kept_when_they_are_gone() -> None:
    metrics = reports(0, 120)
    metrics[IMAGES_PER_S] = [[(1.0, 5), (2.0, 80)], [(2.0, 40)]]
    wanted, state = ArrivalPolicy(CATCH_UP_S)(context(metrics, 1))
    assert (wanted, state) == (3, {IMAGES_PER_S: 60})
    del metrics[IMAGES_PER_S]
    assert ArrivalPolicy(CATCH_UP_S)(context(metrics, 1, state=state)) == (3, state)


@given(st.integers(1, 8), st.floats(0, 1000), st.floats(0, 100_000))
def test_number_that_was_come_down_to_is_not_left_upwards_again_by_the_same_load(
    now: int, arrivals: float, waiting: float
) -> None:
    load = Load(waiting, arrivals, RATE)
    after = wanted_replicas(now, load, CATCH_UP_S)
    if after < now:
        assert wanted_replicas(after, load, CATCH_UP_S) <= after


@given(st.integers(1, 8), st.floats(1, 10_000), st.floats(1, 500))
def test_replicas_can_take_what_arrives(now: int, arrivals: float, rate: float) -> None:
    wanted = wanted_replicas(now, Load(0, arrivals, rate), CATCH_UP_S)
    assert wanted * rate * UTILISATION >= arrivals * 0.999


def test_refused_pushes_are_demand_although_the_backlog_stands_still_at_its_bound() -> None:
    meter = LoadMeter()
    for second in range(40):  # 100 are taken and 300 refused in each second, and 10,000 wait in all of them
        found = meter.report(
            Reading(float(second), 10_000, 50_000 + 100 * second, 300 * second, 100 * second, 0.9 * second)
        )
    assert found == {
        IMAGES_WAITING: 10_000,
        ARRIVALS_PER_S: pytest.approx(400),
        IMAGES_PER_S: pytest.approx(100),
    }
    assert wanted_replicas(1, Load(10_000, 400, 100), CATCH_UP_S) == 8


def reading(at_s: float, waiting: int = 100, done: int = 0, busy_s: float = 0.0, **changes: Any) -> Reading:
    return Reading(
        **{"at_s": at_s, "waiting": waiting, "arrived": 0, "refused": 0, "done": done, "busy_s": busy_s} | changes
    )


def measured(*readings: Reading) -> float | None:
    """Return what the replica can do, after the readings; it had been warm before."""
    meter = LoadMeter()
    meter.report(reading(-20.0, done=1))
    found: dict[str, float] = {}
    for one in readings:
        found = meter.report(one)
    return found.get(IMAGES_PER_S)


def test_replica_without_images_waiting_says_nothing_of_what_it_can_do() -> None:
    assert measured(reading(0, 0), reading(1, 0, done=30, busy_s=0.9)) is None


def test_replica_with_few_images_waiting_says_nothing_of_what_it_can_do() -> None:
    """Some wait for a moment in any plant, and small batches keep it busy."""
    assert measured(reading(0, 29), reading(1, 100, done=30, busy_s=1.0)) is None
    assert measured(reading(0, 30), reading(1, 30, done=30, busy_s=1.0)) == pytest.approx(30)


def test_detector_that_idles_because_workers_are_slow_says_nothing_of_what_it_can_do() -> None:
    assert measured(reading(0), reading(1, done=30, busy_s=0.3)) is None


def test_first_images_of_a_replica_are_not_measured() -> None:
    meter = LoadMeter()
    for second in range(10):
        found = meter.report(reading(float(second), done=1 + 5 * second, busy_s=float(second)))
        assert IMAGES_PER_S not in found


def test_what_it_has_just_done_it_can_do() -> None:
    busy = [reading(0), reading(1, done=30, busy_s=1.0)]
    assert measured(*busy) == pytest.approx(30)
    assert measured(*busy, reading(2, 0, done=80, busy_s=1.9)) == pytest.approx(50)
    assert measured(*busy, reading(2, 0, done=31, busy_s=1.1)) == pytest.approx(30)


def test_calls_within_a_window_report_what_is_known() -> None:
    meter = LoadMeter()
    assert meter.report(reading(0, arrived=0)) == {IMAGES_WAITING: 100}
    assert meter.report(reading(0.2, 90, arrived=500)) == {IMAGES_WAITING: 90}
    assert meter.report(reading(1.0, arrived=20)) == {IMAGES_WAITING: 100, ARRIVALS_PER_S: pytest.approx(20)}
    assert meter.report(reading(1.5, arrived=900))[ARRIVALS_PER_S] == pytest.approx(20)


def test_arrivals_are_never_negative_where_the_server_was_emptied_and_kept_where_it_does_not_know() -> None:
    meter = LoadMeter()
    meter.report(reading(0, arrived=1000, refused=1000))
    assert meter.report(reading(1, arrived=0))[ARRIVALS_PER_S] == 0
    assert meter.report(reading(2, arrived=10))[ARRIVALS_PER_S] == 10
    assert meter.report(reading(3, arrived=None))[ARRIVALS_PER_S] == 10


@pytest.mark.parametrize("section", [WorkerSettings(), DetectorSettings(replicas=3)])
def test_without_max_replicas_nothing_scales(section: WorkerSettings | DetectorSettings) -> None:
    assert autoscaling_config(section) is None


def test_serve_is_told_bounds_delays_and_policy() -> None:
    config = autoscaling_config(DetectorSettings(replicas=2, max_replicas=5, catch_up_s=20))
    assert config is not None
    assert (config.min_replicas, config.max_replicas) == (2, 5)
    assert config.upscale_delay_s == 0 < config.downscale_delay_s
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context(reports(1600, 40), 2, highest=5))[0] == 3


@pytest.mark.parametrize(("fewest", "most"), [(3, 2), (0, 2)])
def test_bounds_that_contradict_each_other_are_refused(fewest: int, most: int) -> None:
    with pytest.raises(ConfigError, match=f"worker.replicas={fewest}"):
        autoscaling_config(WorkerSettings(replicas=fewest, max_replicas=most))
