"""`flawstream score` with what is real: an engine beside a stream worker, Ray Data, and storage that speaks S3."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from helpers.fakes import png
from helpers.s3_server import point_to
from helpers.tiny_models import write_version
from soak import score as soak

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream.storage import Location, list_names, write_file
from schemas.errors import MessageError, ModelUnavailableError, Reason
from schemas.messages import DetectionResult, MapCodec
from schemas.settings import ModelSettings, Settings
from serving.scoring.job import score_parts
from serving.scoring.listing import FOLDER, Source, list_images
from serving.scoring.output import Output, RunParameters
from serving.scoring.rows import build_table
from serving.scoring.scorer import Scorer
from serving.scoring.start import open_run
from serving.scoring.stored_images import read_image
from workers.redis.embedded import EmbeddedServer


def test_rows_are_what_a_worker_with_a_real_engine_publishes(tmp_path: Path) -> None:
    images = soak.write_images(tmp_path / "images", 72)
    Path(images[5].path).write_bytes(b"no image")
    soak.write_versions(tmp_path / "models", images)
    with EmbeddedServer() as server:
        streamed = asyncio.run(soak.judge_by_worker(tmp_path / "models", server, images))

    async def score() -> list[dict[str, object]]:
        detector = soak.open_detector(tmp_path / "models")
        await detector.start()
        scorer = Scorer(detector, Settings(), MapCodec.NONE, threads=2)
        outcomes = await scorer.score(images)
        scorer.close()
        await detector.stop()
        rows: list[dict[str, object]] = build_table(images, outcomes, MapCodec.NONE).to_pylist()
        return rows

    rows = asyncio.run(score())
    assert [row["path"] for row in rows] == [image.path for image in images]
    found = {str(row["path"]): list(soak.differences(row, streamed[str(row["path"])])) for row in rows}
    assert found == {image.path: [] for image in images}
    assert streamed[images[5].path] == Reason.UNDECODABLE
    results = [result for result in streamed.values() if isinstance(result, DetectionResult)]
    assert {result.verdict for result in results} == {"normal", "anomalous"}
    assert any(result.boxes for result in results)


@pytest.mark.usefixtures("cluster")
def test_error_in_an_actor_is_raised_as_our_own_with_the_node(tmp_path: Path) -> None:
    root = tmp_path / "models"
    registry = Registry(str(root))
    write_version(registry, "bottle", spec=Backbone(ModelSettings(input_size=64)).spec, weights=b"no safetensors")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    output = Output(str(tmp_path / "out.parquet"))
    settings = Settings()
    parameters = RunParameters(
        url=str(tmp_path / "images"),
        suffixes=(".png",),
        category="bottle",
        category_from=None,
        registry=str(root),
        maps=MapCodec.NONE,
        images_per_part=10,
        engine=settings.detector.engine,
        device=settings.detector.device,
        precision=settings.detector.precision,
        limits=settings.limits.model_dump(),
    )
    run, _ = open_run(output, parameters, again=False)
    with pytest.raises(ModelUnavailableError, match=r"on node .*'bottle' cannot be used"):
        list(score_parts(output, run, settings, [0]))
    assert not output.finished()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give a bucket with images, and point S3's clients to the server."""
    point_to(monkeypatch, s3_server)
    store = boto3.client("s3")
    store.create_bucket(Bucket="archive")
    for number in range(1100):  # more than a page
        store.put_object(Bucket="archive", Key=f"line/bottle/{number:04}.png", Body=png(number % 256))
    for key, body in (("empty.png", b""), ("notes.txt", b"x"), (".hidden/a.png", b"x"), ("large.png", bytes(2048))):
        store.put_object(Bucket="archive", Key=f"line/{key}", Body=body)
    store.put_object(Bucket="archive", Key="liner/a.png", Body=png())
    yield "s3://archive"
    store.close()


def test_bucket_is_listed_page_by_page_and_read_within_limits(bucket: str) -> None:
    images = list(list_images(Source(f"{bucket}/line", (".png",), category_from=FOLDER)))
    assert [image.path for image in images[:2]] == [f"{bucket}/line/bottle/{number:04}.png" for number in range(2)]
    assert [(image.path, image.category) for image in images[1100:]] == [
        (f"{bucket}/line/empty.png", ""),
        (f"{bucket}/line/large.png", ""),
    ]
    matched = list(list_images(Source(f"{bucket}/line/*/*7.png", (".png",), "bottle")))
    assert len(matched) == 110
    assert read_image(images[7].path, 1024) == png(7)
    for path, reason in (
        (images[1100].path, Reason.UNDECODABLE),
        (images[1101].path, Reason.TOO_LARGE),
        (f"{bucket}/line/absent.png", Reason.UNAVAILABLE_REFERENCE),
        ("s3://no-such-bucket/a.png", Reason.UNAVAILABLE_REFERENCE),
    ):
        with pytest.raises(MessageError) as caught:
            read_image(path, 1024)
        assert caught.value.reason is reason, path


def test_results_in_a_bucket_are_written_listed_and_removed(bucket: str) -> None:
    output = Output(f"{bucket}/results.parquet")
    assert output.finished() == set()
    output.write_listing(list_images(Source(f"{bucket}/line/bottle", (".png",), "bottle")), 1000)
    assert len(output.read_listing(1)) == 100
    write_file(Location.of(f"{output.url}/part-00003.parquet"), b"x")
    assert output.finished() == {3}
    output.clear()
    assert list_names(Location.of(output.url)) == []
