"""Serve's options for autoscaling, and the reports of replicas that `serving.scaling` decides by."""

import time
import warnings
from collections.abc import Callable

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from schemas.errors import ConfigError, FlawstreamError
from schemas.settings import WorkerSettings
from schemas.settings.section import ScaledSection
from serving.scaling import LoadMeter, Reading
from workers.observe.backlog import Backlog

DOWNSCALE_DELAY_S = 60.0
"""The policy must have asked for fewer replicas for this long before one is removed; the same again for the next."""

_REPORT_S = 1.0
_LOOK_BACK_S = 10.0
"""Older reports are ignored: the stream server or the replica may be down."""


def autoscaling_config(section: ScaledSection) -> AutoscalingConfig | None:
    """Build Serve's autoscaling options for a deployment; None if it has a fixed number of replicas.

    Raises:
        ConfigError: `max_replicas` is below `replicas`, or `replicas` is 0, so that no replica reports.
    """
    most, fewest = section.max_replicas, section.replicas
    if most is None:
        return None
    name = "worker" if isinstance(section, WorkerSettings) else "detector"
    if not 1 <= fewest <= most:
        raise ConfigError(
            f"{name}.replicas={fewest} and {name}.max_replicas={most}: replicas must be 1 or more, since replicas "
            "report what arrives, and at most max_replicas; or leave max_replicas out"
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
                policy_function="serving.scaling:ArrivalPolicy",
                policy_kwargs={"catch_up_s": section.catch_up_s},
            ),
        )


class LoadReports:
    """The reports of one replica, for a deployment's `record_autoscaling_stats`.

    Args:
        backlog: Measures the streams.
        work: Returns how many images this replica has done, and the seconds in which it has worked on any.
    """

    def __init__(self, backlog: Backlog, work: Callable[[], tuple[int, float]]) -> None:
        self._backlog = backlog
        self._work = work
        self._meter = LoadMeter()

    async def make(self) -> dict[str, float]:
        """Return the numbers to report; empty if the streams cannot be read."""
        try:
            streams = await self._backlog.read()
        except FlawstreamError:  # the workers log that the stream server is unavailable
            return {}
        done, busy_s = self._work()
        return self._meter.report(
            Reading(time.monotonic(), streams.waiting, streams.arrived, streams.refused, done, busy_s)
        )
