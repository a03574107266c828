"""`flawstream demo`: trains, serves, streams images and reports, end to end, on photographs of solar cells."""

import asyncio
import random
from pathlib import Path
from threading import Event
from typing import Annotated

import typer
from rich.table import Table

from flawstream_cli.cluster import on_cluster
from flawstream_cli.commands.serve import running, wait_for_stop, with_redis
from flawstream_cli.commands.train import train_all
from flawstream_cli.round_trip import RoundTrip, stream_samples
from flawstream_cli.terminal import ExitCode, err, print_json, print_message, read_settings, table
from flawstream_cli.training_summary import training_table
from schemas.manifest import EvaluationMetrics
from schemas.settings import Settings
from training.datasets.elpv import export_elpv
from training.datasets.mvtec import load_mvtec
from training.datasets.samples import CategoryData, Sample
from training.report.report import JudgedImage, write_report
from workers.redis.embedded import EmbeddedServer, free_port

_API_PORT = 8000
_EPOCHS = 6
"""Fewer than the default recipe's 20, to take a few minutes on two cores (docs/benchmarks/demo.md)."""


def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep everything running until Ctrl-C, and print the addresses.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Folder for data, models and report.")] = Path(".flawstream/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = _EPOCHS,
) -> None:
    """Train and serve two categories of solar cells, stream the test images through Redis, and report.

    The images are from the ELPV data set (package elpv-dataset, CC BY-NC-SA 4.0). Functional cells are trained on; the
    other functional cells and the surely defective ones are judged. The last line of output is JSON.

    Example: `flawstream demo --keep`

    Exit code 1: an image was lost, or has two outcomes.
    """
    settings = read_settings(
        None,
        registry={"root": str(folder / "models")},
        training={"epochs": epochs},
        redis={"prefix": "flawstream-demo"},
        api={"port": free_port(_API_PORT)},
    )
    err.rule("1. Data")
    data = load_mvtec(export_elpv(folder / "data"))
    err.print(_data_table(data))

    err.rule("2. Training")
    with on_cluster(None) as cluster:
        _train(data, settings)

        err.rule("3. Serving")
        stop = Event()
        server = EmbeddedServer(on_failure=stop.set)
        with server, running(with_redis(settings, server.url), cluster) as addresses:
            err.rule("4. Streaming")
            trip = asyncio.run(stream_samples(with_redis(settings, server.url), _shuffled_tests(data)))

            err.rule("5. Result")
            metrics = trip.metrics()
            err.print(table("Judged on the stream", _RESULT_COLUMNS, _result_rows(trip, metrics)))
            report = folder / "report.html"
            write_report(report, "flawstream demo: solar cells", _judged(trip), metrics)
            print_message(f"report: {report}")
            if keep:
                err.print("everything keeps running; Ctrl-C stops it")
                print_json(_summary(trip, metrics) | {"addresses": addresses})
                wait_for_stop(stop)
                server.require_running()
    if not keep:  # after everything has stopped, so that the JSON is the last line
        print_json(_summary(trip, metrics))
    if trip.lost or trip.duplicates:
        raise typer.Exit(ExitCode.FAILED)


def _data_table(data: list[CategoryData]) -> Table:
    columns = ("category", "train (normal)", "test normal", "test defective")
    rows = (
        (d.name, len(d.train), sum(not s.anomalous for s in d.test), sum(s.anomalous for s in d.test)) for d in data
    )
    return table("Solar cells (ELPV)", columns, rows)


def _train(data: list[CategoryData], settings: Settings) -> None:
    manifests, failures = train_all(data, settings)
    for name, reason in failures.items():
        print_message(f"{name} failed: {reason}", "red")
    if failures:
        raise typer.Exit(ExitCode.FAILED)
    err.print(training_table(manifests))


def _shuffled_tests(data: list[CategoryData]) -> list[tuple[str, Sample]]:
    samples = [(category.name, sample) for category in data for sample in category.test]
    random.Random(0).shuffle(samples)  # noqa: S311 - an order, not a secret
    return samples


_RESULT_COLUMNS = ("category", "images", "AUROC", "false alarms", "recall", "p50 ms", "p99 ms", "img/s")


def _result_rows(trip: RoundTrip, metrics: dict[str, EvaluationMetrics]) -> list[tuple[object, ...]]:
    return [
        (
            name,
            measured.normal_images + measured.anomalous_images,
            measured.image_auroc,
            measured.false_alarm_rate,
            measured.recall,
            round(trip.latency_ms(0.5, name)),
            round(trip.latency_ms(0.99, name)),
            round(trip.images_per_s(name), 1),
        )
        for name, measured in metrics.items()
    ]


def _summary(trip: RoundTrip, metrics: dict[str, EvaluationMetrics]) -> dict[str, object]:
    return {
        "images": len(trip.pushed_at),
        "results": len(trip.results),
        "dead": len(trip.dead),
        "lost": trip.lost,
        "duplicates": trip.duplicates,
        "img_per_s": round(trip.images_per_s(), 2),
        "p50_ms": round(trip.latency_ms(0.5), 1),
        "p99_ms": round(trip.latency_ms(0.99), 1),
        "categories": {
            name: {
                "auroc": measured.image_auroc,
                "false_alarm_rate": measured.false_alarm_rate,
                "recall": measured.recall,
            }
            for name, measured in metrics.items()
        },
    }


def _judged(trip: RoundTrip) -> list[JudgedImage]:
    return [
        JudgedImage(
            path=trip.samples[message_id].path,
            category=result.category,
            defect=trip.samples[message_id].defect,
            anomalous=trip.samples[message_id].anomalous,
            score=result.score,
            threshold=result.threshold,
            map=result.map,
        )
        for message_id, result in trip.results.items()
    ]
