"""Whether the registry is there: its storage answers, and shows at least one current version.

A folder that is not mounted looks like an empty one, so that a registry without any current version counts as away.
"""

import logging
import time

from flawstream.registry.registry import Registry
from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import StorageUnavailableError
from workers.redis.backoff import backoff_s

_log = logging.getLogger(__name__)

LOG_S = 30.0
"""Time between two log lines about a registry that is away."""


def read_currents(registry: Registry) -> dict[str, str]:
    """Return the current version of every category.

    Raises:
        StorageUnavailableError: The storage cannot be read, or there is no current version.
    """
    currents = registry.currents()
    if not currents:
        raise StorageUnavailableError(
            f"there is no current version in {registry.root}: its storage is not mounted, registry.root is wrong, or "
            "nothing is trained yet; mount it, correct --registry, or run `flawstream train`"
        )
    return currents


def wait_for_versions(registry: Registry, metrics: Metrics = NO_METRICS) -> None:
    """Wait until the registry is there; blocks. Logs at once for what, and then every 30 s.

    Args:
        registry: The registry.
        metrics: Reports that it is away.
    """
    failures = 0
    logged_s = -LOG_S
    while True:
        try:
            read_currents(registry)
        except StorageUnavailableError as error:
            metrics.set(m.REGISTRY_UP, 0)
            failures += 1
            if time.monotonic() - logged_s >= LOG_S:
                logged_s = time.monotonic()
                _log.warning("waiting for the registry: %s", error)
            time.sleep(backoff_s(failures))
        else:
            metrics.set(m.REGISTRY_UP, 1)
            return
