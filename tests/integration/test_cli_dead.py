"""`flawstream dead replay` and `purge`, and what `push` says when it is refused, on a real server."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from helpers.command_line import Run, make_run
from helpers.fakes import png
from helpers.raw_redis import RawRedis

from flawstream_cli.commands import push as push_command
from schemas.errors import Reason
from schemas.messages import DeadLetter
from schemas.settings import RedisSettings
from schemas.wire import dead_letter_fields


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], redis_settings: RedisSettings) -> Run:
    """Run commands on the test's server."""
    run = make_run(monkeypatch, capsys)
    return lambda *arguments: run(*arguments, "--redis", redis_settings.url)


@pytest.fixture
def raw(redis_settings: RedisSettings) -> Iterator[RawRedis]:
    with RawRedis(int(redis_settings.url.rsplit(":", 1)[1].split("/")[0])) as raw:
        yield raw


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give the list of questions asked; they are answered with no, until something is put in front."""
    asked: list[str] = []

    def confirm(question: str, **_: object) -> bool:
        agreed = asked[:1] == ["yes"]
        asked.append(question)
        return agreed

    monkeypatch.setattr(typer, "confirm", confirm)
    return asked


def make_dead_letter(raw: RawRedis, message_id: str, reason: Reason = Reason.UNDECODABLE, at: str = "*") -> str:
    letter = DeadLetter(
        fields={b"id": message_id.encode(), b"category": b"bottle", b"image": b"\x00"},
        reason=reason,
        detail="it is no image",
        deliveries=1,
        failed_at=datetime(2026, 1, 1, tzinfo=UTC),
        entry_id="1-0",
    )
    fields = dead_letter_fields(letter)
    dead_id = raw("XADD", "flawstream:dead", at, *(part for field in fields.items() for part in field))
    assert isinstance(dead_id, bytes)
    return dead_id.decode()


def replayed(raw: RawRedis) -> list[str]:
    return [fields["id"].decode() for _, fields in raw.entries("flawstream:images")]


def test_replay_sends_those_named_again_and_says_which_are_not_there_any_more(run: Run, raw: RawRedis) -> None:
    ids = [make_dead_letter(raw, name) for name in "abc"]
    ran = run("dead", "replay", ids[2], ids[0], "--json")
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert (ran.code, replayed(raw)) == (0, ["c", "a"])
    assert [one["dead_id"] for one in told] == [ids[2], ids[0]]
    assert [one["entry_id"] for one in told] == [entry_id for entry_id, _ in raw.entries("flawstream:images")]
    again = run("dead", "replay", ids[0], ids[1])
    assert (again.code, replayed(raw)) == (1, ["c", "a", "b"])
    assert f"{ids[0]}: already replayed or purged" in again.err


def test_replay_by_reason_leaves_the_others(run: Run, raw: RawRedis) -> None:
    for number in range(3):
        make_dead_letter(raw, f"unknown-{number}", Reason.UNKNOWN_CATEGORY)
        make_dead_letter(raw, f"broken-{number}")
    ran = run("dead", "replay", "--reason", "unknown_category", "--yes")
    assert (ran.code, ran.err) == (0, "3 replayed\n")
    assert replayed(raw) == [f"unknown-{number}" for number in range(3)]
    assert raw.count("XLEN", "flawstream:dead") == 3


def test_replay_and_purge_of_many_ask_and_do_nothing_unless_agreed(run: Run, raw: RawRedis, answer: list[str]) -> None:
    make_dead_letter(raw, "a")
    make_dead_letter(raw, "b", Reason.POISON)
    for arguments in (
        ("replay", "--all"),
        ("purge", "--all"),
        ("purge", "--reason", "poison"),
        ("purge", "--older-than", "1s"),
    ):
        ran = run("dead", *arguments)
        assert (ran.code, ran.err) == (1, "nothing was done; --yes skips this question\n")
    assert [question.split(" from before")[0] for question in answer] == [
        "replay 2 images?",
        "purge 2 dead letters, with their images?",
        "purge 1 dead letters, with their images?",
        "purge those of 2 dead letters",
    ]
    assert raw.count("XLEN", "flawstream:dead") == 2
    answer.insert(0, "yes")
    assert run("dead", "replay", "--all").code == 0
    assert replayed(raw) == ["a", "b"]


def test_where_nobody_can_answer_nothing_is_done(run: Run, raw: RawRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dead_letter(raw, "a")
    with Path("/dev/null").open(encoding="utf-8") as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        ran = run("dead", "purge", "--all")
    assert ran.code == 1
    assert "--yes skips this question" in ran.err
    assert raw.count("XLEN", "flawstream:dead") == 1


def test_a_replay_that_finds_no_room_says_how_far_it_came(
    run: Run, raw: RawRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAWSTREAM_BACKLOG__MAX_IMAGES", "2")
    monkeypatch.setattr("flawstream_cli.commands.dead._WAIT_FOR_CAPACITY_S", 0.0)
    for name in "abc":
        make_dead_letter(raw, name)
    ran = run("dead", "replay", "--all", "--yes")
    assert (ran.code, replayed(raw)) == (4, ["a", "b"])
    assert "2 replayed; the rest stay dead letters" in ran.err
    assert "raise backlog.max_images" in ran.err
    assert raw.count("XLEN", "flawstream:dead") == 1


def test_purge_by_id_by_age_and_of_all(run: Run, raw: RawRedis) -> None:
    week_ago = datetime.now(UTC) - timedelta(days=7)
    old = [make_dead_letter(raw, "old", at=f"{round(week_ago.timestamp() * 1000)}-{number}") for number in range(1, 4)]
    young = make_dead_letter(raw, "young")
    assert run("dead", "purge", old[0]).code == 0
    assert run("dead", "purge", old[0]).code == 1
    assert run("dead", "purge", "--older-than", "6d", "--yes", "--json").out == '{"purged": 2}\n'
    assert [entry_id for entry_id, _ in raw.entries("flawstream:dead")] == [young]
    assert run("dead", "purge", "--all", "--yes").err == "1 dead letters purged\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("replay",),
        ("replay", "1-1", "--all"),
        ("purge", "--all", "--reason", "poison"),
        ("purge", "--older-than", "soon", "--yes"),
        ("replay", "--reason", "bad_luck"),
    ],
    ids=" ".join,
)
def test_a_choice_that_is_not_clear_is_refused(run: Run, raw: RawRedis, arguments: tuple[str, ...]) -> None:
    make_dead_letter(raw, "a")
    assert run("dead", *arguments).code == 2
    assert raw.count("XLEN", "flawstream:dead") == 1


def test_what_is_no_id_is_refused_with_how_one_looks(run: Run) -> None:
    ran = run("dead", "replay", "part-7")
    assert ran.code == 3
    assert "one looks like 1763900000000-0" in ran.err


def test_list_by_reason_shows_these_alone_under_the_count_of_all(run: Run, raw: RawRedis) -> None:
    for number in range(12):
        make_dead_letter(raw, f"broken-{number}")
    poison = make_dead_letter(raw, "worst", Reason.POISON)
    ran = run("dead", "list", "--reason", "poison", "--json")
    assert [json.loads(line)["dead_id"] for line in ran.out.splitlines()] == [poison]
    title = run("dead", "list", "--reason", "poison").out.splitlines()[0]
    assert title.strip() == "13 dead letters: 12 undecodable, 1 poison"
    assert len(run("dead", "list", "-n", 10, "--json").out.splitlines()) == 10


def test_push_with_an_id_writes_once(run: Run, raw: RawRedis, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(png())
    assert run("push", image, "-c", "bottle", "--id", "cam1-42").code == 0
    assert run("push", image, "-c", "bottle", "--id", "cam1-42").code == 0
    assert replayed(raw) == ["cam1-42"]
    assert run("push", image, image, "-c", "bottle", "--id", "cam1-43").code == 2


def test_push_that_is_refused_says_why_and_how_far_it_came(
    run: Run, raw: RawRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAWSTREAM_BACKLOG__MAX_IMAGES", "2")
    monkeypatch.setattr(push_command, "_WAIT_FOR_CAPACITY_S", 0.0)
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png())
    ran = run("push", tmp_path, "-c", "bottle", "--json")
    assert ran.code == 4
    assert json.loads(ran.out.splitlines()[-1])["reason"] == "backlog_full"
    assert f"2 of 3 are pushed; push again from {tmp_path / 'c.png'} on" in ran.err
    assert "error (backlog_full): 2 images wait on flawstream:images and 2 are allowed" in ran.err
    assert raw.count("XLEN", "flawstream:images") == 2


def test_image_pushed_without_an_id_is_listed_by_its_file(run: Run, raw: RawRedis, tmp_path: Path) -> None:
    (tmp_path / "part-7.png").write_bytes(png())
    assert run("push", tmp_path / "part-7.png", "--category", "bottle").code == 0
    entries = raw("XRANGE", "flawstream:images", "-", "+")
    assert isinstance(entries, list)
    assert isinstance(entries[0], list)
    fields = entries[0][1]
    assert isinstance(fields, list)
    letter = DeadLetter(
        fields=dict(zip(fields[::2], fields[1::2], strict=True)),
        reason=Reason.UNDECODABLE,
        detail="it is no image",
        deliveries=1,
        failed_at=datetime(2026, 1, 1, tzinfo=UTC),
        entry_id="1-0",
    )
    raw("XADD", "flawstream:dead", "*", *(part for field in dead_letter_fields(letter).items() for part in field))
    assert "part-7.png" in run("dead", "list").out
