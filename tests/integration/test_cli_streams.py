"""The commands that talk to a stream server, on a real one and without any."""

import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from helpers.command_line import Ran, Run, make_run
from helpers.fakes import make_result, png
from helpers.raw_redis import RawRedis
from helpers.registries import overwrite
from helpers.tiny_models import write_version

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.errors import Reason
from schemas.messages import DeadLetter, Verdict
from schemas.settings import ModelSettings, RedisSettings
from schemas.wire import dead_letter_fields, result_fields

HOSTILE = "\x1b[2J[red]part[/]\x07\u202e"
HARMLESS = "\N{REPLACEMENT CHARACTER}[2J[red]part[/]\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], redis_settings: RedisSettings) -> Run:
    """Run commands on the test's server where no other is named."""
    run = make_run(monkeypatch, capsys)
    return lambda *arguments, redis=redis_settings.url: run(*arguments, "--redis", redis)


@pytest.fixture
def raw(redis_settings: RedisSettings) -> Iterator[RawRedis]:
    with RawRedis(int(redis_settings.url.rsplit(":", 1)[1].split("/")[0])) as raw:
        yield raw


def write(raw: RawRedis, stream: str, fields: dict[bytes, bytes]) -> str:
    entry_id = raw("XADD", stream, "*", *(part for field in fields.items() for part in field))
    assert isinstance(entry_id, bytes)
    return entry_id.decode()


def write_dead(raw: RawRedis, message_id: str, detail: str = "it is no image") -> str:
    letter = DeadLetter(
        fields={b"id": message_id.encode(), b"category": message_id.encode(), b"image": b"\x00\x01"},
        reason=Reason.UNDECODABLE,
        detail=detail,
        deliveries=1,
        failed_at=datetime(2026, 1, 1, tzinfo=UTC),
        entry_id="1-0",
    )
    return write(raw, "flawstream:dead", dead_letter_fields(letter))


def write_result(raw: RawRedis, message_id: str) -> str:
    result = make_result(
        message_id, score=2.0, p_value=0.05, verdict=Verdict.ANOMALOUS, extra={"note": message_id.encode()}
    )
    return write(raw, "flawstream:results", result_fields(result))


@pytest.fixture
def nobody() -> Iterator[str]:
    """Give the URL of a port on which nobody listens, and nobody else will."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{held.getsockname()[1]}/0"


@pytest.mark.parametrize(
    "arguments",
    [("watch",), ("dead", "list"), ("dead", "show", "1-0"), ("push", __file__, "-c", "bottle")],
    ids=" ".join,
)
def test_server_that_does_not_answer_is_exit_code_4_and_one_clear_message(
    run: Run, nobody: str, arguments: tuple[str, ...]
) -> None:
    ran = run(*arguments, redis=nobody)
    assert (ran.code, ran.out) == (4, "")
    message = ran.err.splitlines()[-1]
    assert message.startswith("error (stream_unavailable): the stream server at 127.0.0.1:")
    assert "see that it runs and that redis.url names it" in message


def test_doctor_says_which_server_does_not_answer(run: Run, nobody: str) -> None:
    ran = run("doctor", "--json", redis=nobody)
    found = json.loads(ran.out)
    assert ran.code == 1
    assert found["streams"]["ok"] is False
    assert "does not answer" in found["streams"]["detail"]


def test_doctor_loads_what_is_current_and_names_all_that_cannot_be(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAWSTREAM_DETECTOR__ENGINE", "torch")

    def look() -> tuple[int, bool, str]:
        ran = run("doctor", "--json", "--registry", tmp_path)
        assert "loading 4 current versions" in ran.err
        found = json.loads(ran.out)["versions"]
        return ran.code, found["ok"], found["detail"]

    registry = Registry(str(tmp_path))
    spec = Backbone(ModelSettings(input_size=64)).spec
    for category in ("bottle", "cable", "screw", "tile"):
        write_version(registry, category, spec=spec)
    assert look() == (0, True, "4 of 4 load")
    for category in ("cable", "tile"):
        overwrite(str(tmp_path), f"{category}/v1/flow.safetensors", b"damaged")
    code, well, detail = look()
    assert (code, well) == (1, False)
    assert detail.startswith("2 of 4 cannot be loaded: ")
    assert all(f"{name}/v1/flow.safetensors has SHA-256" in detail for name in ("cable", "tile"))


def test_doctor_reports_the_served_backbone_and_versions_that_cannot_be_served(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAWSTREAM_DETECTOR__ENGINE", "torch")

    def look() -> tuple[int, bool, str]:
        ran = run("doctor", "--json", "--registry", tmp_path)
        found = json.loads(ran.out)["registry"]
        return ran.code, found["ok"], found["detail"]

    registry = Registry(str(tmp_path))
    spec = Backbone(ModelSettings(input_size=64)).spec
    for category in ("bottle", "cable"):
        write_version(registry, category, spec=spec)
    assert look() == (0, True, f"{tmp_path}: 2 categories: bottle, cable; on {spec.summary}")
    write_version(registry, "tile", spec=spec.model_copy(update={"name": "other"}), promote=False)
    registry.promote("tile", "v1")
    code, well, detail = look()
    assert (code, well) == (1, True)  # as no such network can be opened
    assert detail.startswith(f"{tmp_path}: 3 categories: bottle, cable, tile; on {spec.summary} (2), other at 64 px")
    (tmp_path / "tile" / "current").unlink()
    (tmp_path / "cable" / "v1" / "manifest.json").write_text("{")
    code, well, detail = look()
    assert (code, well) == (1, False)
    assert "cable/v1/manifest.json is damaged" in detail


def test_dead_list_pages_from_the_newest(run: Run, raw: RawRedis) -> None:
    ids = [write_dead(raw, f"part-{number}") for number in range(3)]
    newest = [json.loads(line) for line in run("dead", "list", "-n", 2, "--json").out.splitlines()]
    assert [one["dead_id"] for one in newest] == [ids[2], ids[1]]
    assert newest[0]["fields"] == {"id": "part-2", "category": "part-2"}
    assert newest[0]["image_bytes"] == 2
    older = run("dead", "list", "--before", ids[1], "--json").out.splitlines()
    assert [json.loads(line)["dead_id"] for line in older] == [ids[0]]


def test_dead_list_where_nothing_was_refused(run: Run) -> None:
    assert run("dead", "list") == Ran(0, "", "no dead letters\n")
    assert run("dead", "list", "--json") == Ran(0, "", "")


def test_dead_show_of_what_is_not_there(run: Run) -> None:
    ran = run("dead", "show", "17-3")
    assert (ran.code, ran.out) == (1, "")
    assert "there is no dead letter 17-3" in ran.err


def test_dead_list_shows_hostile_text_as_text(run: Run, raw: RawRedis) -> None:
    write_dead(raw, HOSTILE, HOSTILE)
    ran = run("dead", "list")
    assert ran.code == 0
    (row,) = (line for line in ran.out.splitlines() if "part" in line)
    assert row.count(HARMLESS) == 3
    assert not {"\x1b", "\x07", "\u202e"} & set(ran.out)
    as_json = run("dead", "list", "--json")
    assert not {"\x1b", "\x07", "\u202e"} & set(as_json.out)
    assert json.loads(as_json.out)["detail"] == HOSTILE


def test_watch_shows_hostile_text_as_text(run: Run, raw: RawRedis) -> None:
    write_result(raw, HOSTILE)
    ran = run("watch", "-n", 1, "--since", 0)
    assert ran.code == 0
    assert ran.out.startswith("anomalous bottle")
    assert HARMLESS in ran.out
    assert not {"\x1b", "\x07", "\u202e"} & set(ran.out + ran.err)


def test_watch_as_json_prints_a_line_a_result_and_nothing_else(run: Run, raw: RawRedis) -> None:
    ids = [write_result(raw, f"part-{number}") for number in range(2)]
    ran = run("watch", "-n", 2, "--since", 0, "--json")
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert [(one["entry_id"], one["id"]) for one in told] == [(ids[0], "part-0"), (ids[1], "part-1")]
    assert told[0]["extra"] == {"note": "part-0"}
    assert (ran.code, ran.err) == (0, "")


def test_watch_saves_a_picture_of_each_result_and_keeps_the_newest(run: Run, raw: RawRedis, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.png").write_bytes(png(200))
    entries = [write_result(raw, name) for name in ("0.png", "../1.png", "1.png")]
    saved = tmp_path / "saved"
    command = ("watch", "--since", "0", "--count", 3, "--save", saved)
    ran = run(*command, "--images", tmp_path / "in", "--keep", 2)
    assert ran.code == 0
    assert "0.png is drawn without its original" in ran.err
    assert {file.name for file in saved.iterdir()} == {f"_1.png_{entries[1]}.jpg", f"1.png_{entries[2]}.jpg"}
    assert run(*command, "--images", tmp_path / "none").code == 3
    assert run("watch", "--images", tmp_path).code == 2


def test_watch_since_an_entry_starts_behind_it(run: Run, raw: RawRedis) -> None:
    first, second = write_result(raw, "a"), write_result(raw, "b")
    assert json.loads(run("watch", "-n", 1, "--since", first, "--json").out)["entry_id"] == second


def test_push_writes_what_it_can_and_names_what_it_cannot(
    run: Run, raw: RawRedis, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("images")
    (folder / "a.png").write_bytes(png())
    (folder / "empty.png").touch()
    (folder / "note.txt").touch()
    ran = run("push", folder, folder / "gone.png", "-c", "bottle", "--json")
    told = {line["file"].rsplit("/", 1)[1]: line for line in map(json.loads, ran.out.splitlines())}
    assert ran.code == 1
    ((entry_id, fields),) = raw.entries("flawstream:images")
    assert told["a.png"]["entry_id"] == entry_id
    assert (fields["category"], fields["image"], fields["file"]) == (b"bottle", png(), b"a.png")
    assert {name: line["reason"] for name, line in told.items() if "reason" in line} == {
        "empty.png": "malformed",
        "gone.png": "unreadable",
    }
    assert "gone.png: unreadable: No such file" in ran.err


def test_push_of_a_name_of_any_bytes_writes_it_escaped(
    run: Run, raw: RawRedis, tmp_path_factory: pytest.TempPathFactory
) -> None:
    image = tmp_path_factory.mktemp("images") / os.fsdecode(b"gut_\xfc.png")
    image.write_bytes(png())
    ran = run("push", image, "-c", "bottle", "--json")
    assert (ran.code, json.loads(ran.out)["file"]) == (0, str(image).replace("\udcfc", r"\udcfc"))
    ((_, fields),) = raw.entries("flawstream:images")
    assert fields["file"] == rb"gut_\udcfc.png"


def test_push_of_another_image_with_the_same_id_is_refused(
    run: Run, raw: RawRedis, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("images")
    for name, grey in (("a.png", 100), ("b.png", 200)):
        (folder / name).write_bytes(png(grey))
    assert run("push", folder / "a.png", "-c", "bottle", "--id", "part-7").code == 0
    assert run("push", folder / "a.png", "-c", "bottle", "--id", "part-7").code == 0
    ran = run("push", folder / "b.png", "-c", "bottle", "--id", "part-7", "--json")
    assert (ran.code, json.loads(ran.out)["reason"]) == (1, "id_conflict")
    assert raw.count("XLEN", "flawstream:images") == 1


def test_push_that_waits_in_vain_says_what_to_look_at(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    image = tmp_path_factory.mktemp("images") / "a.png"
    image.write_bytes(png())
    ran = run("push", image, "-c", "bottle", "--wait", "--timeout-s", 0.1)
    assert ran.code == 1
    assert "is `flawstream serve` running on this server?" in ran.err
