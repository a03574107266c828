"""The composition root: settings in, a Ray Serve application out; and running it on a cluster.

`ray serve` configurations name `serving.app:build`; `flawstream serve` calls `run`.
"""

import logging
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from schemas.errors import ConfigError
from schemas.settings import Settings
from serving.deployments import ApiDeployment, DetectorDeployment, StreamWorkerDeployment

APPLICATION = "flawstream"

_SHUTDOWN_S = 30.0
_SLOT_IMAGES_FACTOR = 2


def build(settings: Settings) -> serve.Application:
    """Wire the deployments together: Api -> Detector, StreamWorker -> Detector.

    Args:
        settings: The whole tree; in a Serve configuration the `args` of the application.
    """
    detector, worker = settings.detector, settings.worker
    detectors = _deployment(
        DetectorDeployment,
        name="Detector",
        num_replicas=detector.replicas,
        max_ongoing_requests=max(8, _SLOT_IMAGES_FACTOR * detector.max_queue_images),
        num_cpus=detector.num_cpus,
        num_gpus=detector.num_gpus,
    ).bind(settings)
    workers = None
    if worker.replicas:
        workers = _deployment(
            StreamWorkerDeployment,
            name="StreamWorker",
            num_replicas=worker.replicas,
            max_ongoing_requests=8,
            num_cpus=worker.num_cpus,
        ).bind(settings, detectors)
    return _deployment(ApiDeployment, name="Api", num_replicas=1, max_ongoing_requests=256, num_cpus=0).bind(
        settings, detectors, workers
    )


def run(settings: Settings) -> str:
    """Deploy on the cluster that `flawstream.cluster.connect` joined, and wait until every replica is ready.

    Returns:
        The address of the HTTP API.

    Raises:
        ConfigError: A deployment could not start.
    """
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(http_options=HTTPOptions(host=settings.api.host, port=settings.api.port), logging_config=quiet)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.run(build(settings), name=APPLICATION, logging_config=quiet)
    except RuntimeError as error:
        status = serve.status().applications.get(APPLICATION)
        problems = {name: told.message for name, told in status.deployments.items() if told.message} if status else {}
        raise ConfigError(
            "the service could not start: "
            + ("; ".join(f"{name}: {message}" for name, message in problems.items()) or str(error))
        ) from error
    return f"http://{settings.api.host}:{settings.api.port}"


def stop() -> None:
    """Take the service down; workers finish the batches under way first."""
    serve.shutdown()


def _deployment(target: type, *, num_cpus: float, num_gpus: float = 0.0, **options: Any) -> serve.Deployment:
    return serve.deployment(
        target,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        health_check_period_s=5,
        **options,
    )
