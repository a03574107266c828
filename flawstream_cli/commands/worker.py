"""`flawstream worker`: runs stream worker and detector in one process, without Ray."""

import asyncio
import os
import signal
import socket
from typing import Annotated

import typer

from flawstream.registry.registry import Registry
from flawstream.telemetry.choose_tracer import open_tracer
from flawstream.telemetry.liveness import Liveness
from flawstream.telemetry.metrics import Metrics
from flawstream.telemetry.prometheus import serve_metrics
from flawstream.telemetry.traces import Tracer
from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    RedisOption,
    RegistryOption,
    busy,
    print_json,
    print_message,
    read_settings,
)
from schemas.errors import StageTimeoutError
from schemas.settings import Settings
from serving.availability import wait_for_versions
from serving.detector import DetectorService, open_detector
from workers.consume.sharded import ShardedWorker
from workers.redis.client import require_server
from workers.redis.connection import make_client
from workers.redis.persistence import all_warnings, require_no_eviction

_REPORT_S = 10.0


def worker(
    name: Annotated[
        str | None,
        typer.Option(help="Consumer name; by default the host name. Several workers on one host need different names."),
    ] = None,
    redis: RedisOption = None,
    registry: RegistryOption = None,
    engine: Annotated[str | None, typer.Option(help="auto, cuda, ncnn, openvino, torch or triton.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Expose Prometheus metrics at this port of metrics.host.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Judge images from the stream until Ctrl-C, with the detector in this process, without Ray.

    Waits until the registry can be read and has a current version. Prints one JSON line to standard output when ready,
    and another at the end. On Ctrl-C or SIGTERM, finishes the batches in flight within `worker.drain_s` and releases
    the rest. After a crash, a worker with the same name continues with the entries that are pending for it. Where
    another live worker has the name, ends with exit code 3 and reads nothing. Where decoding or the detector hangs for
    longer than `worker.stage_timeout_s`, ends with exit code 1, so that its supervisor starts it again.

    Example: `flawstream worker --redis redis://plant:6379/0 --registry /models --name line7`
    """
    settings = read_settings(
        config,
        redis={"url": redis},
        registry={"root": registry},
        detector={"engine": engine},
        worker={"name": name},
        metrics={"port": metrics_port},
    )
    liveness = Liveness()
    with serve_metrics(settings.metrics, liveness) as (metrics, metrics_url), open_tracer(settings.tracing) as tracer:
        opened = Registry(settings.registry.root)
        with busy("loading the models"):
            wait_for_versions(opened, metrics)
            detector = open_detector(opened, settings.model, settings.detector, metrics)
        detector_alive = asyncio.run(_work(settings, detector, metrics, metrics_url, tracer, liveness))
    if not detector_alive:
        print_message("the detector has stopped unexpectedly; restart the worker", "red")
        raise typer.Exit(ExitCode.FAILED)


async def _work(
    settings: Settings,
    detector: DetectorService,
    metrics: Metrics,
    metrics_url: str | None,
    tracer: Tracer,
    liveness: Liveness,
) -> bool:
    """Run the worker until SIGINT or SIGTERM, or until the detector fails; return whether the detector is alive."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with make_client(settings.redis) as client:
        await require_server(client)
        for warning in all_warnings(await require_no_eviction(client)):
            print_message(warning, "yellow")
        await detector.start()
        beating = asyncio.create_task(liveness.beat_for_ever())
        name = settings.worker.name or socket.gethostname()
        stream_worker = ShardedWorker(client, name, detector, settings, metrics, tracer=tracer)
        await stream_worker.take_name()
        working = asyncio.create_task(stream_worker.run(stop))
        print_json(
            {
                "worker": stream_worker.consumer,
                "redis": settings.redis.url,
                "metrics": metrics_url,
                "detector": detector.status(),
            }
        )
        reported = -1
        while not working.done() and detector.alive:
            await asyncio.wait([working], timeout=_REPORT_S)
            stats = stream_worker.stats
            if stats.read != reported and not stop.is_set():
                reported = stats.read
                print_message(
                    f"{stats.results} results, {stats.dead.total()} dead letters, {stats.retries} retries, "
                    f"{stats.deferred} images deferred"
                )
        alive = detector.alive
        stop.set()
        try:
            await working
        except StageTimeoutError as error:
            print_json(stream_worker.stats.as_dict())
            print_message(str(error), "red")
            os._exit(ExitCode.FAILED)  # an end in order would wait for the thread that hangs
        finally:
            beating.cancel()
            await stream_worker.close()
            await detector.stop()
            print_json(stream_worker.stats.as_dict())
    return alive
