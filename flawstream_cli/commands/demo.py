"""`flawstream demo`: the main job end to end on photographs of solar cells: train, serve, push, read, judge, report."""

import asyncio
import random
from pathlib import Path
from typing import Annotated

import typer

from flawstream_cli.commands.serve import running, wait_for_stop, with_redis
from flawstream_cli.commands.train import train_all, training_table
from flawstream_cli.on_cluster import on_cluster
from flawstream_cli.round_trip import RoundTrip, stream_samples
from flawstream_cli.terminal import ExitCode, err, print_json, read_settings, say, table
from schemas.manifest import EvaluationMetrics
from training.datasets.elpv import export_elpv
from training.datasets.mvtec import load_mvtec
from training.report.report import JudgedImage, write_report
from workers.redis.embedded import EmbeddedServer, free_port

_API_PORT = 8000
_EPOCHS = 6
"""The default recipe has 20; this is what fits into a few minutes on two cores (docs/benchmarks/demo.md)."""


def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave everything up until Ctrl-C and print the addresses.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Where data, models and report go.")] = Path(".flawstream/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = _EPOCHS,
) -> None:
    """Train and serve two categories of solar cells, stream the test images through Redis, and report.

    The images are those of the ELPV data set (package elpv-dataset, CC BY-NC-SA 4.0): functional cells train, the
    other functional cells and the surely defective ones are judged. The last line of output is JSON.

    Example: `flawstream demo --keep`

    Exit code 1: an image was lost, or ended twice.
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
    columns = ("category", "train (normal)", "test normal", "test defective")
    rows = (
        (d.name, len(d.train), sum(not s.anomalous for s in d.test), sum(s.anomalous for s in d.test)) for d in data
    )
    err.print(table("Solar cells (ELPV)", columns, rows))

    err.rule("2. Training")
    with on_cluster(None) as joined:
        manifests, failures = train_all(data, settings, joined)
        if failures:
            for name, reason in failures.items():
                say(f"{name} failed: {reason}", "red")
            raise typer.Exit(ExitCode.FAILED)
        err.print(training_table(manifests))

        err.rule("3. Serving")
        with EmbeddedServer() as server, running(with_redis(settings, server.url), joined) as addresses:
            err.rule("4. Streaming")
            samples = [(one.name, sample) for one in data for sample in one.test]
            random.Random(0).shuffle(samples)  # noqa: S311 - an order, not a secret
            trip = asyncio.run(stream_samples(with_redis(settings, server.url), samples))

            err.rule("5. Result")
            metrics = trip.metrics()
            err.print(table("Judged on the stream", _RESULT_COLUMNS, _result_rows(trip, metrics)))
            report = folder / "report.html"
            write_report(report, "flawstream demo: solar cells", _judged(trip), metrics)
            say(f"report: {report}")
            if keep:
                err.print("everything stays up; Ctrl-C ends it")
                print_json(_summary(trip, metrics) | {"addresses": addresses})
                wait_for_stop()
    if not keep:  # when all that stops has had its say: the last line is the program's
        print_json(_summary(trip, metrics))
    if trip.lost or trip.duplicates:
        raise typer.Exit(ExitCode.FAILED)


_RESULT_COLUMNS = ("category", "images", "AUROC", "false alarms", "recall", "p50 ms", "p99 ms", "img/s")


def _result_rows(trip: RoundTrip, metrics: dict[str, EvaluationMetrics]) -> list[tuple[object, ...]]:
    return [
        (
            name,
            found.normal_images + found.anomalous_images,
            found.image_auroc,
            found.false_alarm_rate,
            found.recall,
            round(trip.latency_ms(0.5, name)),
            round(trip.latency_ms(0.99, name)),
            round(trip.images_per_s(name), 1),
        )
        for name, found in metrics.items()
    ]


def _summary(trip: RoundTrip, metrics: dict[str, EvaluationMetrics]) -> dict[str, object]:
    return {
        "images": len(trip.sent),
        "results": len(trip.results),
        "dead": len(trip.dead),
        "lost": trip.lost,
        "duplicates": trip.duplicates,
        "img_per_s": round(trip.images_per_s(), 2),
        "p50_ms": round(trip.latency_ms(0.5), 1),
        "p99_ms": round(trip.latency_ms(0.99), 1),
        "categories": {
            name: {"auroc": found.image_auroc, "false_alarm_rate": found.false_alarm_rate, "recall": found.recall}
            for name, found in metrics.items()
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
