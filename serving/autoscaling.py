"""How many replicas there are to be, after the images that wait. Runs in Serve's controller: it must never block.

Serve takes this module along by value, as its controller may run where flawstream is not installed: what
`BacklogPolicy` uses must stand here or in the standard library.
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
"""The metric that replicas report and the policy reads."""

DOWNSCALE_DELAY_S = 60.0
"""One replica goes when for so long there was work for fewer; the next one as much later."""

_REPORT_S = 1.0
_LOOK_BACK_S = 10.0
"""A report older than this is none: the server is away, or the replica."""
_SLACK = 0.5
"""A replica goes when those that stay would have half of their share: at the edge nothing goes to and fro."""


class BacklogPolicy:
    """Wants one replica for each so many images waiting.

    More at once; fewer one by one, as a backlog is short for two reasons that look alike: little comes in, or there
    are as many replicas as it takes. The delay is Serve's, see `autoscaling_config`.

    Args:
        images_per_replica: Images waiting for each replica, above which there are to be more.
    """

    def __init__(self, images_per_replica: int) -> None:
        self._images_per_replica = images_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Decide.

        Args:
            context: What Serve knows; asked ten times a second.

        Returns:
            How many replicas there are to be, within the bounds; as many as now where nobody knows what waits.
            And no state.
        """
        now: int = context.target_num_replicas
        waiting = _newest((context.raw_metrics or {}).get(IMAGES_WAITING, {}))
        wanted = now
        if waiting is not None:
            full = math.ceil(waiting / self._images_per_replica)
            if full > now:
                wanted = full
            elif waiting <= (now - 1) * self._images_per_replica * _SLACK:
                wanted = now - 1
        lowest, highest = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(lowest, min(highest, wanted)), {}


def _newest(reports: Mapping[Any, Any]) -> float | None:
    """Give what was reported last by any replica: they all read the same streams."""
    points = [point for series in reports.values() for point in series if _is_count(point.value)]
    return max(points, key=lambda point: point.timestamp).value if points else None


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def autoscaling_config(section: ScaledSection) -> AutoscalingConfig | None:
    """Make what Serve is told of a deployment's autoscaling; nothing where it has a fixed number of replicas.

    Raises:
        ConfigError: The most replicas are fewer than the fewest, or there is none that could report a backlog.
    """
    most, fewest = section.max_replicas, section.replicas
    if most is None:
        return None
    name = "worker" if isinstance(section, WorkerSettings) else "detector"
    if not 1 <= fewest <= most:
        raise ConfigError(
            f"{name}.replicas={fewest} and {name}.max_replicas={most}: the fewest must be 1 or more, as replicas "
            "report the backlog, and no more than the most; or leave max_replicas out"
        )
    with warnings.catch_warnings():
        # deprecated for an environment variable that this Ray does not yet read; its own 10 s are no "at once"
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
    """Report what waits, for a deployment's `record_autoscaling_stats`; nothing where nobody knows."""
    try:
        return {IMAGES_WAITING: (await backlog.read()).images}
    except FlawstreamError:  # who needs the server has said that it is away
        return {}
