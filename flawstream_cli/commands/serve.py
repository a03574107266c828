"""`flawstream serve`: detectors, stream workers and HTTP API, with a Redis server of their own where none is named."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Annotated

import typer

from flawstream.registry.registry import Registry
from flawstream_cli.cluster import Cluster, on_cluster
from flawstream_cli.terminal import ConfigOption, RedisOption, RegistryOption, busy, print_json, read_settings, say
from schemas.errors import ConfigError
from schemas.settings import Settings
from serving import app as service
from workers.redis.embedded import EmbeddedServer, free_port

DATA_DIR = Path(".flawstream/valkey")
_REDIS_PORT = 6379


def serve(
    redis: RedisOption = None,
    registry: RegistryOption = None,
    data_dir: Annotated[
        Path, typer.Option(help="Where the embedded server keeps its data; only without --redis.")
    ] = DATA_DIR,
    redis_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the embedded server; 6379 if absent, any free one where that is taken."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address of the HTTP API.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the HTTP API.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, ncnn, openvino, torch or triton.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Stream workers.")] = None,
    detectors: Annotated[int | None, typer.Option(min=1, help="Detector replicas.")] = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster; without it, this machine alone.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Serve the trained categories until Ctrl-C.

    Without --redis an embedded Valkey server starts, whose data outlives a restart. When all is up, one JSON line with
    the addresses goes to standard output.

    Example: `flawstream serve --redis redis://plant:6379/0 --registry s3://plant/models`
    """
    settings = read_settings(
        config,
        redis={"url": redis},
        registry={"root": registry},
        api={"host": host, "port": port},
        detector={"engine": engine, "replicas": detectors},
        worker={"replicas": workers},
    )
    if redis is not None and redis_port is not None:
        raise ConfigError("--redis-port is for the embedded server, and --redis names another; leave one of them out")
    embedded = redis is None and "url" not in settings.redis.model_fields_set
    with contextlib.ExitStack() as stack:
        if embedded:
            say(f"starting an embedded Valkey server in {data_dir} ...")
            server = stack.enter_context(EmbeddedServer(data_dir, redis_port or free_port(_REDIS_PORT)))
            settings = with_redis(settings, server.url)
        if ray_address is None:  # a cluster may reach what this machine cannot
            require_startable(settings)
        joined = stack.enter_context(on_cluster(ray_address))
        addresses = stack.enter_context(running(settings, joined))
        say(f"push an image   flawstream push PART.png --category CATEGORY --redis {settings.redis.url}")
        say("stop            Ctrl-C")
        print_json(addresses)
        wait_for_stop()
    say("stopped")


def with_redis(settings: Settings, url: str) -> Settings:
    """Point settings at another server."""
    return settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": url})})


def require_startable(settings: Settings) -> None:
    """See that the service can start here, and say where no image can be judged yet.

    Raises:
        ConfigError: A port is taken, or a folder is none.
        StreamUnavailableError: The stream server does not answer.
        RegistryError: The registry cannot be read.
    """
    service.require_startable(settings)
    root = settings.registry.root
    if not Registry(root).currents():
        say(f"{root} has no model versions yet: images are refused until `flawstream train` has made some", "yellow")


@contextlib.contextmanager
def running(settings: Settings, joined: Cluster) -> Iterator[dict[str, str]]:
    """Have the service up on a cluster for as long as the context lasts.

    Yields:
        The addresses: `api`, `redis`, `dashboard`.
    """
    root = settings.registry.root
    if "://" not in root:  # replicas run in other folders
        absolute = settings.registry.model_copy(update={"root": str(Path(root).absolute())})
        settings = settings.model_copy(update={"registry": absolute})
    with busy("starting detector, stream worker and API; this takes half a minute"):
        api = service.run(settings)
    addresses = {"api": api, "redis": settings.redis.url, "dashboard": joined.dashboard_url}
    say(f"API             {api}  (documentation at {api}/docs)")
    say(f"Redis           {settings.redis.url}")
    if joined.dashboard_url:
        say(f"Ray dashboard   {joined.dashboard_url}  (its token: ray get-auth-token)")
    try:
        yield addresses
    finally:
        with busy("stopping: batches under way are finished first"):
            service.stop()


def wait_for_stop() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
