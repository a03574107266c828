"""The folder of a run: listing, parts, what is left of killed processes, and rows as Parquet."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.fakes import make_result

from schemas.errors import ConfigError, Reason, TransientError
from schemas.messages import AnomalyMap, Box, MapCodec
from schemas.settings import LimitSettings
from serving.scoring.attempts import Attempt
from serving.scoring.listing import ListedImage
from serving.scoring.output import Output, Run, RunParameters
from serving.scoring.rows import build_table
from workers.ports import Refusal

IMAGES = [ListedImage(f"/images/{number}.png", "bottle") for number in range(5)]


def make_run(images: int = 5, images_per_part: int = 2) -> Run:
    parameters = RunParameters(
        url="/images",
        suffixes=(".png",),
        category="bottle",
        category_from=None,
        registry="/models",
        maps=MapCodec.NONE,
        images_per_part=images_per_part,
        engine="auto",
        device="auto",
        precision="auto",
        limits=LimitSettings().model_dump(),
    )
    return Run(
        parameters=parameters,
        versions={"bottle": "v1"},
        images=images,
        listing_sha256="0" * 64,
        listed_at=datetime(2026, 1, 1, tzinfo=UTC),
        flawstream="0",
    )


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(str(tmp_path / "results.parquet"))


def test_run_is_read_as_it_was_written(output: Output) -> None:
    assert output.read_run() is None
    output.write_run(make_run())
    assert output.read_run() == make_run()


@pytest.mark.parametrize(("images", "parts", "last"), [(1, 1, 1), (4, 2, 2), (5, 3, 1)])
def test_run_has_as_many_parts_as_its_images_need(images: int, parts: int, last: int) -> None:
    run = make_run(images)
    assert (run.parts, run.images_in(parts - 1)) == (parts, last)


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2}'])
def test_damaged_record_of_a_run_is_refused(output: Output, content: str) -> None:
    output.write_run(make_run())
    Path(output.url, "_flawstream.json").write_text(content)
    with pytest.raises(ConfigError, match="--again"):
        output.read_run()


def test_listing_is_read_part_by_part_names_that_are_not_utf8_included(output: Output) -> None:
    odd = ListedImage("/images/odd\udcff.png", "")
    count, digest, categories = output.write_listing(iter([*IMAGES[:4], odd]), 2)
    assert (count, categories) == (5, {"bottle", ""})
    assert [output.read_listing(part) for part in range(3)] == [IMAGES[:2], IMAGES[2:4], [odd]]
    assert digest != output.write_listing(iter(IMAGES), 2)[1]
    with pytest.raises(ConfigError, match="shared folder"):
        output.read_listing(3)


def test_rows_have_what_results_have_or_the_error(output: Output) -> None:
    box = Box(x=1, y=2, width=3, height=4, score=5.5)
    grids = AnomalyMap(codec=MapCodec.GRID_F16, shape=(8, 8), grids=((1, 1), (2, 1)), data=b"123456")
    result = make_result("0", boxes=(box,), map=grids, image_shape=(30, 40))
    odd = ListedImage("/images/odd\udcff.png", "bottle")
    output.write_part(
        7, build_table([IMAGES[0], odd], [result, Refusal(Reason.UNDECODABLE, "damaged")], MapCodec.GRID_F16)
    )
    assert output.finished() == {7}
    assert output.count([7]) == {"images": 2, "failed": 1, "anomalous": 0}
    judged, refused = pq.read_table(output.url).to_pylist()
    assert judged == {
        "path": "/images/0.png",
        "category": "bottle",
        "model": "bottle@v1",
        "score": 0.5,
        "p_value": 0.5,
        "threshold": 1.0,
        "verdict": "normal",
        "boxes": [box.model_dump()],
        "image_height": 30,
        "image_width": 40,
        "map_codec": "grid-f16",
        "map_shape": [8, 8],
        "map_grids": [[1, 1], [2, 1]],
        "map": b"123456",
        "error": None,
        "error_detail": None,
    }
    assert {name: value for name, value in refused.items() if value is not None} == {
        "path": r"/images/odd\udcff.png",
        "category": "bottle",
        "error": "undecodable",
        "error_detail": "damaged",
    }


def test_without_maps_there_are_no_columns_of_maps(output: Output) -> None:
    output.write_part(0, build_table(IMAGES[:1], [make_result("0")], MapCodec.NONE))
    assert not [name for name in pq.read_table(output.url).column_names if name.startswith("map")]


def test_storage_that_cannot_be_written_may_be_written_later(output: Output) -> None:
    Path(output.url).write_bytes(b"a file where the folder should be")
    with pytest.raises(TransientError, match=r"part-00000\.parquet cannot be written"):
        output.write_part(0, build_table(IMAGES[:1], [make_result("0")], MapCodec.NONE))


def test_clearing_removes_what_a_run_writes_and_nothing_else(output: Output) -> None:
    folder = Path(output.url)
    output.write_run(make_run())
    output.write_listing(iter(IMAGES), 2)
    output.write_part(0, build_table(IMAGES[:1], [make_result("0")], MapCodec.NONE))
    Attempt(output.attempt_file(1))
    (folder / ".part-00001.parquet.0123abcd").write_bytes(b"half")
    (folder / "mine.parquet").write_bytes(b"x")
    assert output.has_other_files()
    output.remove_unfinished()
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "_flawstream.json",
        "mine.parquet",
        "part-00000.parquet",
    ]
    output.clear()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["mine.parquet"]


def test_image_that_was_alone_in_two_deaths_is_not_scored_again(output: Output) -> None:
    file = output.attempt_file(0)
    assert [Attempt(file).is_careful for _ in range(3)] == [False, False, True]
    for _ in range(2):
        attempt = Attempt(file)
        assert attempt.is_careful
        assert attempt.begin_alone(0) is None
        assert attempt.begin_alone(1) is None  # and here the process dies
    attempt = Attempt(file)
    assert attempt.begin_alone(0) is None
    refusal = attempt.begin_alone(1)
    assert refusal is not None
    assert refusal.reason is Reason.POISON
    attempt.end()
    assert not Attempt(file).is_careful
