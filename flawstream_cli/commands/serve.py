"""`flawstream serve`: runs detectors, stream workers and HTTP API, by default with an embedded stream server."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Annotated

import typer

from flawstream_cli.cluster import Cluster, on_cluster
from flawstream_cli.terminal import (
    ConfigOption,
    RedisOption,
    RegistryOption,
    busy,
    print_json,
    print_message,
    read_settings,
)
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
        Path, typer.Option(help="Data folder of the embedded server; only without --redis.")
    ] = DATA_DIR,
    redis_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the embedded server; by default 6379, or any free one if that is taken."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address of the HTTP API.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the HTTP API.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, ncnn, openvino, torch or triton.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Number of stream workers.")] = None,
    detectors: Annotated[int | None, typer.Option(min=1, help="Number of detector replicas.")] = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster; by default only this machine.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Serve the trained categories until Ctrl-C.

    Waits until the registry can be read and has a current version. Without --redis, starts an embedded Valkey server,
    whose data survives a restart. Should it end, it is started again; where that does not help, the service stops with
    exit code 4. When everything is ready, prints one JSON line with the addresses to standard output.

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
        raise ConfigError("--redis-port is for the embedded server, --redis for another server; leave one of them out")
    embedded = redis is None and "url" not in settings.redis.model_fields_set
    server: EmbeddedServer | None = None
    stop = Event()
    with contextlib.ExitStack() as stack:
        if embedded:
            print_message(f"starting an embedded Valkey server in {data_dir} ...")
            print_message(
                "each push is on the disk before it is confirmed, which limits it to some hundreds a second; "
                "for more bring a server of your own with --redis (docs/how-to/many-shards.md)"
            )
            server = EmbeddedServer(data_dir, redis_port or free_port(_REDIS_PORT), on_failure=stop.set)
            stack.enter_context(server)
            settings = with_redis(settings, server.url)
        if ray_address is None:  # a remote cluster may reach servers and folders that this machine cannot
            service.require_startable(settings)
        cluster = stack.enter_context(on_cluster(ray_address))
        addresses = stack.enter_context(running(settings, cluster))
        print_message(f"push an image   flawstream push PART.png --category CATEGORY --redis {settings.redis.url}")
        print_message("stop            Ctrl-C")
        print_json(addresses)
        wait_for_stop(stop)
        if server is not None:
            server.require_running()
    print_message("stopped")


def with_redis(settings: Settings, url: str) -> Settings:
    """Return a copy of the settings with another `redis.url`."""
    return settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": url})})


@contextlib.contextmanager
def running(settings: Settings, cluster: Cluster) -> Iterator[dict[str, str]]:
    """Run the service on a cluster while the context lasts.

    Yields:
        The addresses: `api`, `redis`, `dashboard`.
    """
    root = settings.registry.root
    if "://" not in root:  # replicas have other working directories
        absolute = settings.registry.model_copy(update={"root": str(Path(root).absolute())})
        settings = settings.model_copy(update={"registry": absolute})
    with busy("starting detector, stream worker and API; this takes half a minute"):
        api = service.run(settings)
    addresses = {"api": api, "redis": settings.redis.url, "dashboard": cluster.dashboard_url}
    print_message(f"API             {api}  (documentation at {api}/docs)")
    print_message(f"Redis           {settings.redis.url}")
    if cluster.dashboard_url:
        print_message(f"Ray dashboard   {cluster.dashboard_url}  (its token: ray get-auth-token)")
    try:
        yield addresses
    finally:
        with busy("stopping: batches in flight are finished first"):
            service.stop()


def wait_for_stop(stop: Event) -> None:
    """Wait for Ctrl-C or SIGTERM, or until `stop` is set."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
