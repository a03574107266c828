"""Composition root of the service: builds the Ray Serve application from the settings, runs it and stops it.

Ray Serve configurations name `serving.app:build`; `flawstream serve` calls `run`.
"""

import asyncio
import logging
import re
import socket
import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.context import _get_global_client  # no public function returns Serve's address
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from flawstream.registry.registry import Registry
from schemas.errors import ConfigError
from schemas.settings import ApiSettings, DetectorSettings, RedisSettings, Settings, WorkerSettings
from serving.api.security import Tokens, warn_if_open
from serving.autoscaling import autoscaling_config
from serving.availability import wait_for_versions
from serving.deployments import ApiDeployment, DetectorDeployment, StreamWorkerDeployment
from serving.engines import newest_manifest
from workers.redis.client import require_server
from workers.redis.connection import make_client
from workers.redis.persistence import all_warnings, require_no_eviction

_log = logging.getLogger(__name__)

APPLICATION = "flawstream"

_DETECTOR = "Detector"
_WORKER = "StreamWorker"
_SHUTDOWN_S = 30.0
_CLOSING_S = 10.0
"""Time for a worker to close its connections after it has drained."""
_SLOT_IMAGES_FACTOR = 2
_ROUTING_S = 5.0
"""Time between two reports of a detector to the request router."""


def build(settings: Settings) -> serve.Application:
    """Wire the deployments together: Api -> Detector, StreamWorker -> Detector.

    Args:
        settings: All settings; in a Serve configuration the `args` of the application.

    Raises:
        ConfigError: The bounds of autoscaling contradict each other, or a slow detector would count as one that hangs.
    """
    warn_if_open(settings.api)
    detector, worker = settings.detector, settings.worker
    if worker.replicas and worker.stage_timeout_s <= detector.timeout_s:
        raise ConfigError(
            f"worker.stage_timeout_s={worker.stage_timeout_s:g} is not more than detector.timeout_s="
            f"{detector.timeout_s:g}: a detector that takes so long would count as hanging, and end its worker; raise "
            "the first or lower the second"
        )
    detectors = _deployment(
        DetectorDeployment,
        name=_DETECTOR,
        **_replicas(detector),
        max_ongoing_requests=max(8, _SLOT_IMAGES_FACTOR * detector.max_queue_images),
        num_cpus=detector.num_cpus,
        num_gpus=detector.num_gpus,
        request_router_config=RequestRouterConfig(
            request_router_class="serving.request_router:CategoryRouter", request_routing_stats_period_s=_ROUTING_S
        ),
    ).bind(settings)
    workers = None
    if worker.replicas:
        workers = _deployment(
            StreamWorkerDeployment,
            name=_WORKER,
            **_replicas(worker),
            max_ongoing_requests=8,
            num_cpus=worker.num_cpus,
            shutdown_s=max(_SHUTDOWN_S, worker.drain_s + _CLOSING_S),
        ).bind(settings, detectors)
    return _deployment(
        ApiDeployment,
        name="Api",
        num_replicas=settings.api.replicas,
        max_ongoing_requests=256,
        num_cpus=settings.api.num_cpus,
    ).bind(settings, detectors, workers)


def require_startable(settings: Settings) -> None:
    """Check that the service can start on this machine, to fail within a second and not after minutes.

    Waits for the registry: see `serving.availability`.

    Raises:
        ConfigError: The port is taken, the tokens cannot be read, the registry's root is not a folder, or the stream
            server is too old or evicts streams.
        StreamUnavailableError: The stream server does not answer.
        RegistryError: All current versions are damaged.
    """
    _require_free_port(settings.api)
    Tokens(settings.api)
    root = settings.registry.root
    if Path(root).is_file():
        raise ConfigError(f"registry.root={root!r} is a file; name the folder that `flawstream train` wrote to")
    if settings.worker.replicas:
        asyncio.run(_require_streams(settings.redis))
    registry = Registry(root)
    wait_for_versions(registry)
    newest_manifest(registry)


def run(settings: Settings) -> str:
    """Deploy on the cluster of `flawstream_cli.cluster.connect`, and wait until every replica is ready.

    If Serve already runs on the cluster, its HTTP address stays, and that of the settings is ignored with a warning.

    Returns:
        The address of the HTTP API.

    Raises:
        ConfigError: A deployment could not start.
    """
    serve_logging = LoggingConfig(
        log_level="WARNING", enable_access_log=False, encoding=settings.logging.format.upper()
    )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(
            http_options=HTTPOptions(host=settings.api.host, port=settings.api.port), logging_config=serve_logging
        )
        serve.run(build(_with_absolute_paths(settings)), name=APPLICATION, logging_config=serve_logging)
    except (RuntimeError, TimeoutError, RayError, RayServeException) as error:
        raise ConfigError(f"the service could not start: {_start_error(error)}") from error
    http: HTTPOptions = _get_global_client().http_config
    if (http.host, http.port) != (settings.api.host, settings.api.port):
        _log.warning(
            "Serve already runs on this cluster at %s:%s; api.host and api.port are ignored", http.host, http.port
        )
    return f"http://{http.host}:{http.port}"


def detector_handle() -> DeploymentHandle:
    """Return a handle of the running application's detectors."""
    return serve.get_deployment_handle(_DETECTOR, APPLICATION)


def stop() -> None:
    """Stop the service: first the workers drain, while the detectors still run, then everything is deleted.

    Serve itself keeps running, with its port, as it may run other applications.
    """
    try:
        _drain_workers()
        serve.delete(APPLICATION)
    except (RuntimeError, TimeoutError, RayError, RayServeException) as error:
        # nothing is lost: entries that are not completed stay pending, and are reclaimed after the next start
        _log.warning("the service did not stop cleanly: %s", _last_line(str(error)))


def _drain_workers() -> None:
    """Drain every worker replica. Serve chooses the replica of a call, so call until each has answered."""
    status = serve.status().applications.get(APPLICATION)
    if status is None or _WORKER not in status.deployments:
        return
    replicas = sum(status.deployments[_WORKER].replica_states.values())
    handle = serve.get_deployment_handle(_WORKER, APPLICATION)
    drained: set[str] = set()
    deadline_s = time.monotonic() + _SHUTDOWN_S
    while len(drained) < replicas and time.monotonic() < deadline_s:
        responses = [handle.drain.remote() for _ in range(replicas)]
        drained |= {response.result(timeout_s=_SHUTDOWN_S) for response in responses}


def _require_free_port(api: ApiSettings) -> None:
    family = socket.AF_INET6 if ":" in api.host else socket.AF_INET
    try:
        socket.create_server((api.host, api.port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"the HTTP API cannot listen on {api.host} port {api.port}: {error.strerror}; "
            "choose another port with --port (api.port), or another address with --host (api.host)"
        ) from error


async def _require_streams(redis: RedisSettings) -> None:
    async with make_client(redis) as client:
        await require_server(client)
        for warning in all_warnings(await require_no_eviction(client)):
            _log.warning("%s", warning)


def _start_error(error: Exception) -> str:
    """Summarise Serve's messages, which repeat the traceback of a replica for every attempt to start it."""
    status = serve.status().applications.get(APPLICATION)
    deployments = status.deployments if status else {}
    messages = {name: deployment.message for name, deployment in deployments.items() if deployment.message}
    return "; ".join(f"{name}: {_last_line(text)}" for name, text in messages.items()) or _last_line(str(error))


def _last_line(text: str) -> str:
    """Return the last exception in a text with tracebacks, or the text's last line if there is none."""
    exceptions = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*", text, re.MULTILINE)
    lines = exceptions or text.strip().splitlines() or ["no reason given"]
    return str(lines[-1]).strip()


def _replicas(section: WorkerSettings | DetectorSettings) -> dict[str, Any]:
    """Return the Serve options for a fixed number of replicas, or for autoscaling."""
    scaling = autoscaling_config(section)
    return {"num_replicas": section.replicas} if scaling is None else {"autoscaling_config": scaling}


def _with_absolute_paths(settings: Settings) -> Settings:
    """Make the paths of files absolute, since replicas have other working directories."""
    changed = {}
    for name in ("redis", "api"):
        section = getattr(settings, name)
        files = {field: value.absolute() for field, value in section if isinstance(value, Path)}
        changed[name] = section.model_copy(update=files)
    return settings.model_copy(update=changed)


def _deployment(
    target: type, *, num_cpus: float, num_gpus: float = 0.0, shutdown_s: float = _SHUTDOWN_S, **options: Any
) -> serve.Deployment:
    return serve.deployment(
        target,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        graceful_shutdown_timeout_s=shutdown_s,
        health_check_period_s=5,
        **options,
    )
