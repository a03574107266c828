"""Scales the replicas with the backlog. The policy runs in Serve's controller and must never block.

Serve pickles this module by value, since flawstream may not be installed where the controller runs: `BacklogPolicy` may
only use this module and the standard library.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from schemas.errors import ConfigError, FlawstreamError
from schemas.settings import WorkerSettings
from schemas.settings.section import ScaledSection
from workers.observe.backlog import Backlog

IMAGES_WAITING = "images_waiting"
"""Name of the metric that replicas report and the policy reads."""

DOWNSCALE_DELAY_S = 60.0
"""The policy must have asked for fewer replicas for this long before one is removed; the same again for the next."""

_REPORT_S = 1.0
_LOOK_BACK_S = 10.0
"""Older reports are ignored: the stream server or the replica may be down."""
_HYSTERESIS = 0.5
"""A replica is removed only if the others would then have at most this fraction of `images_per_replica` each."""


class BacklogPolicy:
    """Asks for one replica per `images_per_replica` images waiting.

    Scales up in one step, and down by one replica at a time, because a short backlog can mean either of two things:
    few images arrive, or the replicas keep up with many. Serve adds the delay, see `autoscaling_config`.

    Args:
        images_per_replica: Images waiting per replica above which replicas are added.
    """

    def __init__(self, images_per_replica: int) -> None:
        self._images_per_replica = images_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Compute the target number of replicas; Serve calls this ten times a second.

        Args:
            context: Current state and metrics of the deployment.

        Returns:
            The number of replicas within the bounds, unchanged if no replica reports the backlog; and an empty state.
        """
        current: int = context.target_num_replicas
        waiting = _newest((context.raw_metrics or {}).get(IMAGES_WAITING, {}))
        target = current
        if waiting is not None:
            needed = math.ceil(waiting / self._images_per_replica)
            if needed > current:
                target = needed
            elif waiting <= (current - 1) * self._images_per_replica * _HYSTERESIS:
                target = current - 1
        fewest, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(fewest, min(most, target)), {}


def _newest(reports: Mapping[Any, Any]) -> float | None:
    """Return the latest report of any replica; they all read the same streams."""
    points = [point for series in reports.values() for point in series if _is_count(point.value)]
    return max(points, key=lambda point: point.timestamp).value if points else None


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def autoscaling_config(section: ScaledSection) -> AutoscalingConfig | None:
    """Build Serve's autoscaling options for a deployment; None if it has a fixed number of replicas.

    Raises:
        ConfigError: `max_replicas` is below `replicas`, or `replicas` is 0, so that no replica reports the backlog.
    """
    most, fewest = section.max_replicas, section.replicas
    if most is None:
        return None
    name = "worker" if isinstance(section, WorkerSettings) else "detector"
    if not 1 <= fewest <= most:
        raise ConfigError(
            f"{name}.replicas={fewest} and {name}.max_replicas={most}: replicas must be 1 or more, since replicas "
            "report the backlog, and at most max_replicas; or leave max_replicas out"
        )
    with warnings.catch_warnings():
        # metrics_interval_s is deprecated in favour of a variable that this Ray does not read yet; 10 s is too slow
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=fewest,
            max_replicas=most,
            upscale_delay_s=0.0,
            downscale_delay_s=DOWNSCALE_DELAY_S,
            metrics_interval_s=_REPORT_S,
            look_back_period_s=_LOOK_BACK_S,
            policy=AutoscalingPolicy(
                policy_function="serving.autoscaling:BacklogPolicy",
                policy_kwargs={"images_per_replica": section.images_per_replica},
            ),
        )


async def autoscaling_stats(backlog: Backlog) -> dict[str, float]:
    """Report the backlog, for a deployment's `record_autoscaling_stats`; empty if it cannot be read."""
    try:
        return {IMAGES_WAITING: (await backlog.read()).images}
    except FlawstreamError:  # the workers log that the stream server is unavailable
        return {}
