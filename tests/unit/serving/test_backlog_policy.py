"""How many replicas there are to be, decided as Serve has it decided; no cluster."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingContext

from schemas.errors import ConfigError
from schemas.settings import DetectorSettings, WorkerSettings
from serving.autoscaling import IMAGES_WAITING, BacklogPolicy, autoscaling_config

PER_REPLICA = 10
DEPLOYMENT = DeploymentID("StreamWorker", "flawstream")


def context(
    metrics: dict[str, list[list[tuple[float, Any]]]] | None, now: int, *, lowest: int = 1, highest: int = 8
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
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=100.0,
        config=None,
    )


def decide(waiting: Any, now: int, **bounds: int) -> int:
    wanted, state = BacklogPolicy(PER_REPLICA)(context({IMAGES_WAITING: [[(1.0, waiting)]]}, now, **bounds))
    assert state == {}
    return wanted


@pytest.mark.parametrize(
    ("waiting", "now", "wanted"),
    [
        (0, 1, 1),
        (10, 1, 1),
        (11, 1, 2),
        (75, 1, 8),
        (1000, 1, 8),
        (1000, 8, 8),
        (31, 3, 4),
        (30, 3, 3),
        (11, 3, 3),
        (10, 3, 2),
        (0, 8, 7),
    ],
)
def test_more_are_wanted_at_once_and_fewer_one_by_one_with_room_to_spare(waiting: int, now: int, wanted: int) -> None:
    assert decide(waiting, now) == wanted


@given(
    waiting=st.integers() | st.floats() | st.none() | st.text(),
    now=st.integers(0, 200),
    lowest=st.integers(1, 50),
    more=st.integers(0, 50),
)
def test_result_is_within_the_bounds_whatever_is_reported(waiting: Any, now: int, lowest: int, more: int) -> None:
    assert lowest <= decide(waiting, now, lowest=lowest, highest=lowest + more) <= lowest + more


@given(st.none() | st.floats(max_value=-1) | st.just(float("nan")) | st.just(float("inf")), st.integers(1, 8))
def test_what_is_no_count_keeps_the_number(waiting: Any, now: int) -> None:
    assert decide(waiting, now) == now


@pytest.mark.parametrize("metrics", [None, {}, {IMAGES_WAITING: []}, {IMAGES_WAITING: [[], []]}, {"other": [[(1, 0)]]}])
def test_where_nobody_reports_the_number_is_kept(metrics: Any) -> None:
    assert BacklogPolicy(PER_REPLICA)(context(metrics, 5))[0] == 5


def test_newest_report_of_any_replica_counts() -> None:
    reports: list[list[tuple[float, Any]]] = [[(1.0, 70), (5.0, 0)], [(6.0, 25), (2.0, 0)], [(7.0, None)]]
    assert BacklogPolicy(PER_REPLICA)(context({IMAGES_WAITING: reports}, 1))[0] == 3


@given(st.integers(1, 8), st.integers(0, 100))
def test_number_that_was_come_down_to_is_not_left_upwards_again_by_the_same_backlog(now: int, waiting: int) -> None:
    after = decide(waiting, now)
    if after < now:
        assert decide(waiting, after) <= after


@pytest.mark.parametrize("section", [WorkerSettings(), DetectorSettings(replicas=3)])
def test_without_max_replicas_nothing_scales(section: WorkerSettings | DetectorSettings) -> None:
    assert autoscaling_config(section) is None


def test_serve_is_told_bounds_delays_and_policy() -> None:
    config = autoscaling_config(DetectorSettings(replicas=2, max_replicas=5, images_per_replica=7))
    assert config is not None
    assert (config.min_replicas, config.max_replicas) == (2, 5)
    assert config.upscale_delay_s == 0 < config.downscale_delay_s
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context({IMAGES_WAITING: [[(1.0, 15)]]}, 2, highest=5))[0] == 3


@pytest.mark.parametrize(("fewest", "most"), [(3, 2), (0, 2)])
def test_bounds_that_contradict_each_other_are_refused(fewest: int, most: int) -> None:
    with pytest.raises(ConfigError, match=f"worker.replicas={fewest}"):
        autoscaling_config(WorkerSettings(replicas=fewest, max_replicas=most))
