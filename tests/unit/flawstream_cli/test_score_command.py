"""`flawstream score` without Ray: the parts are scored one after another in this process. With Ray: integration."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.command_line import Ran, Run, make_run
from helpers.fakes import png
from helpers.tiny_models import TinyEngine, write_version

from flawstream.registry.registry import Registry
from flawstream_cli.commands import score as command
from schemas.settings import Settings
from serving import engines
from serving.scoring import job, scorer
from serving.scoring.listing import ListedImage
from serving.scoring.output import Output
from serving.scoring.output import Run as ScoringRun
from serving.scoring.rows import Outcome

DEADLY = "deadly.png"


class Death(BaseException):
    """What becomes of the process."""


class InThisProcess:
    """Stands for Ray: scores parts one after another, starting anew where the process would have died.

    Attributes:
        stop_after: Parts after which the user presses Ctrl-C.
    """

    def __init__(self) -> None:
        self.stop_after = 1_000
        self.deaths = 0

    def __call__(
        self, output: Output, run: ScoringRun, settings: Settings, parts: Sequence[int]
    ) -> Iterator[job.ScoredPart]:
        for number, part in enumerate(parts):
            if number == self.stop_after:
                raise KeyboardInterrupt
            while True:
                actor = job.PartScorer(output.url, run, settings, 1)
                try:
                    columns = actor({"part": np.array([part])})
                except Death:
                    self.deaths += 1
                    continue
                finally:
                    actor.close()
                yield job.ScoredPart(**{name: column.tolist()[0] for name, column in columns.items()})
                break


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> InThisProcess:
    stand_in = InThisProcess()
    monkeypatch.setattr(job, "score_parts", stand_in)
    monkeypatch.setattr(command, "on_cluster", contextlib.nullcontext)
    monkeypatch.setattr(engines, "make_engine", lambda *_: TinyEngine())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal"))
    return stand_in


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, scoring: InThisProcess
) -> Run:
    del scoring
    monkeypatch.chdir(tmp_path)
    for category in ("bottle", "cable"):
        write_version(Registry("models"), category)
        for level in range(0, 240, 20):
            store(f"images/{category}/{level:03}.png", png(level))
    given = make_run(monkeypatch, capsys)
    return lambda *arguments: given("score", *arguments, "--registry", "models", "--out", "out.parquet")


def store(name: str, data: bytes) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data)


def rows() -> list[dict[str, Any]]:
    return sorted(pq.read_table("out.parquet").to_pylist(), key=lambda row: str(row["path"]))


def scored_all(ran: Ran) -> dict[str, Any]:
    assert ran.code == 0, ran.err
    document: dict[str, Any] = json.loads(ran.out)
    return document


def test_every_image_is_a_row_and_the_counts_are_one_json_document(run: Run) -> None:
    document = scored_all(run("images", "--category-from", "folder", "--images-per-part", 5, "--json"))
    assert {name: document[name] for name in ("images", "failed", "anomalous", "scored_now", "versions")} == {
        "images": 24,
        "failed": 0,
        "anomalous": 4,
        "scored_now": 24,
        "versions": {"bottle": "v1", "cable": "v1"},
    }
    found = rows()
    assert [Path(row["path"]).relative_to(Path.cwd()).as_posix() for row in found] == [
        f"images/{category}/{level:03}.png" for category in ("bottle", "cable") for level in range(0, 240, 20)
    ]
    assert [(row["model"], row["verdict"]) for row in found[-2:]] == [("cable@v1", "anomalous")] * 2


def test_one_category_for_all(run: Run) -> None:
    scored_all(run("images", "--category", "cable", "--json"))
    assert {row["model"] for row in rows()} == {"cable@v1"}


def test_stopped_run_is_continued_with_the_versions_that_it_began_with(run: Run, scoring: InThisProcess) -> None:
    arguments = ("images", "--category-from", "folder", "--images-per-part", 5, "--json")
    scoring.stop_after = 2
    ran = run(*arguments)
    assert (ran.code, ran.out) == (130, "")
    assert "run the same command again to continue" in ran.err
    before = {path: path.stat().st_mtime_ns for path in Path("out.parquet").glob("part-*")}
    assert len(before) == 2
    write_version(Registry("models"), "bottle", "v2")
    store("images/bottle/new.png", png())
    scoring.stop_after = 1_000
    ran = run(*arguments)
    assert scored_all(ran)["scored_now"] == 14
    assert "10 of 24 images are scored" in ran.err
    assert "goes on with v1, with which it began; v2 is current now" in ran.err.replace("\n", "")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(rows()) == 24
    assert {row["model"] for row in rows()} == {"bottle@v1", "cable@v1"}
    assert scored_all(run(*arguments))["scored_now"] == 0
    assert scored_all(run(*arguments, "--again"))["images"] == 25
    assert {row["model"] for row in rows()} == {"bottle@v2", "cable@v1"}


def test_images_that_cannot_be_judged_are_rows_and_the_exit_code_is_1(run: Run) -> None:
    store("images/bottle/damaged.png", png()[:40])
    store("images/ghost/a.png", png())
    store("images/top.png", png())
    for again in (False, True):  # the second time they are counted in the files
        ran = run("images", "--category-from", "folder", *(["--json"] if again else []))
        assert ran.code == 1
        assert "3 images were not judged" in ran.err
    assert json.loads(ran.out)["failed"] == 3
    assert [row["error"] for row in rows() if row["error"]] == ["undecodable", "unknown_category", "malformed"]
    assert len(rows()) == 27


def test_image_that_kills_its_process_is_poison_and_all_others_are_scored(
    run: Run, scoring: InThisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(f"images/bottle/{DEADLY}", png())
    score = scorer.Scorer.score

    async def die_of_one(self: scorer.Scorer, images: Sequence[ListedImage]) -> Sequence[Outcome]:
        if any(image.path.endswith(DEADLY) for image in images):
            raise Death
        return await score(self, images)

    monkeypatch.setattr(scorer.Scorer, "score", die_of_one)
    ran = run("images", "--category-from", "folder", "--images-per-part", 10)
    assert ran.code == 1
    assert [Path(row["path"]).name for row in rows() if row["error"] == "poison"] == [DEADLY]
    assert (len(rows()), scoring.deaths) == (25, 4)
    assert not list(Path("out.parquet/_attempts").iterdir())


@pytest.mark.parametrize("maps", ["none", "grid-f16", "png16"])
def test_maps_are_written_by_choice(run: Run, maps: str) -> None:
    scored_all(run("images", "--category", "bottle", "--maps", maps, "--json"))
    assert [row.get("map_codec", "none") for row in rows()] == [maps] * 24
    assert all(row.get("map") for row in rows()) == (maps != "none")


def test_results_of_other_parameters_are_not_continued(run: Run) -> None:
    scored_all(run("images", "--category", "bottle", "--json"))
    ran = run("images", "--category", "cable")
    assert ran.code == 3
    assert "category was 'bottle' and is 'cable'" in ran.err
    assert "--again" in ran.err
    assert {row["model"] for row in rows()} == {"bottle@v1"}


def test_results_are_a_list_of_images_for_another_run(run: Run) -> None:
    scored_all(run("images", "--category-from", "folder", "--json"))
    Path("out.parquet").rename("first.parquet")
    write_version(Registry("models"), "bottle", "v2")
    scored_all(run("first.parquet", "--category-from", "category", "--json"))
    assert {row["model"] for row in rows()} == {"bottle@v2", "cable@v1"}


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["images"], 2, "either --category or --category-from"),
        (["images", "-c", "bottle", "--category-from", "folder"], 2, "either --category or --category-from"),
        (["images", "-c", "ghost"], 3, "it has: bottle, cable"),
        (["models/bottle", "-c", "bottle"], 3, "no images at"),
        (["absent", "-c", "bottle"], 3, "there is nothing at"),
        (["images/bottle", "--category-from", "folder"], 3, "no current version"),
        (["images", "--category-from", "part"], 3, "only a Parquet list has columns"),
    ],
)
def test_what_cannot_start_says_why(run: Run, arguments: list[str], code: int, reason: str) -> None:
    ran = run(*arguments)
    assert ran.code == code
    assert reason in " ".join(ran.err.split())
    assert not Path("out.parquet", "_flawstream.json").exists()


def test_folder_of_other_files_is_left_alone(run: Run) -> None:
    store("out.parquet/mine.parquet", b"x")
    ran = run("images", "-c", "bottle")
    assert ran.code == 3
    assert "choose another --out" in ran.err
    assert Path("out.parquet/mine.parquet").read_bytes() == b"x"


def test_version_that_cannot_be_used_stops_the_run(run: Run) -> None:
    write_version(Registry("models"), "bottle", "v2", weights=b"no safetensors")
    ran = run("images", "-c", "bottle")
    assert ran.code == 4
    assert "'bottle' cannot be used" in ran.err


def test_without_ray_data_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "pyarrow" else name)
    ran = run("images", "-c", "bottle")
    assert ran.code == 3
    assert "pip install 'flawstream[batch]'" in ran.err


@pytest.mark.parametrize(
    ("nodes", "parts", "cpus", "gpus", "pool"),
    [
        ([{"CPU": 2}], 10, 0, 0, job.Pool(1, 2, 0.0)),
        ([{"CPU": 16}], 10, 0, 0, job.Pool(4, 4, 0.0)),
        ([{"CPU": 16}], 3, 0, 0, job.Pool(3, 4, 0.0)),
        ([{}, {"CPU": 8}, {"CPU": 3}], 10, 0, 0, job.Pool(3, 3, 0.0)),
        ([{"CPU": 8}], 10, 8, 0, job.Pool(1, 8, 0.0)),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 2}], 10, 0, 0, job.Pool(2, 4, 1.0)),
        ([{"CPU": 8, "GPU": 1}], 10, 2, 0.25, job.Pool(4, 2, 0.25)),
    ],
)
def test_pool_is_as_large_as_the_nodes_allow(
    nodes: list[dict[str, float]], parts: int, cpus: float, gpus: float, pool: job.Pool
) -> None:
    assert job.size_pool(nodes, parts, cpus, gpus) == pool
