"""Log lines as JSON: what is in them, and what never is."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.fakes import FakeClock, FakeDetector, FakeReader, FakeSink, FakeStream, image_entry, png

from flawstream.telemetry import logs
from flawstream.telemetry.logs import JsonLines, set_up_logging
from schemas.errors import DetectorOverloadedError
from schemas.settings import LimitSettings, LoggingSettings, WorkerSettings
from workers.consume.decode import Decoder
from workers.consume.worker import StreamWorker
from workers.ports import Entry

pytestmark = pytest.mark.anyio

SECRET = b"\xff\xd8 the bytes of an image \xff"


class Written:
    """What went to standard error."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    """Log JSON from DEBUG on; afterwards all is as it was."""
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {room: logging.getLogger(room).level for room in logs.ROOMS}
    written = Written()
    monkeypatch.setattr(sys, "stderr", written.stream)
    set_up_logging(LoggingSettings(format="json", level="DEBUG"))
    yield written
    root.handlers[:] = handlers
    for room, level in levels.items():
        logging.getLogger(room).setLevel(level)


def log(message: str, *values: object, **extra: object) -> None:
    logging.getLogger("workers.test").warning(message, *values, extra=extra)


def test_a_line_is_one_object_with_time_level_logger_message_and_what_is_known_of_the_image(written: Written) -> None:
    log("two\nlines of %s", "text", image_id="part-7", category="bottle", model="bottle@v1")
    (line,) = written.lines()
    assert written.text.count("\n") == 1
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "workers.test",
        "message": "two\nlines of text",
        "image_id": "part-7",
        "category": "bottle",
        "model": "bottle@v1",
    }


def test_an_error_has_its_traceback_in_one_field(written: Written) -> None:
    try:
        int("no number")
    except ValueError:
        logging.getLogger("workers.test").exception("failed")
    (line,) = written.lines()
    assert line["error"].startswith("Traceback")
    assert line["error"].endswith("ValueError: invalid literal for int() with base 10: 'no number'")


def test_bytes_are_named_by_their_length_and_never_written(written: Written) -> None:
    log("an image", image=SECRET, view=memoryview(SECRET), listed=[bytearray(SECRET)])
    (line,) = written.lines()
    assert line["image"] == line["view"] == line["listed"][0] == f"<{len(SECRET)} bytes>"
    assert "the bytes" not in written.text


def test_what_is_long_is_cut(written: Written) -> None:
    log("x" * 100_000, detail="y" * 100_000)
    (line,) = written.lines()
    assert len(line["message"]) < 20_000
    assert line["detail"].endswith("(100,000 characters)")


def test_names_of_any_bytes_are_escaped() -> None:
    """Not logged: pytest-xdist cannot pass on what pytest captures of it."""
    record = {"msg": "cannot read %s", "args": ("gut_\udcfc.png",), "file": "\udcfc"}
    line = json.loads(JsonLines().format(logging.makeLogRecord(record)))
    assert (line["message"], line["file"]) == (r"cannot read gut_\udcfc.png", r"\udcfc")


def test_what_json_does_not_know_is_written_as_text(written: Written) -> None:
    log("odd", thing=object)
    assert "object" in written.lines()[0]["thing"]


def test_libraries_are_heard_from_warning_on(written: Written) -> None:
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("workers.test").debug("detail")
    assert [line["message"] for line in written.lines()] == ["detail"]


def make_worker(stream: FakeStream, detector: FakeDetector) -> StreamWorker:
    clock = stream.clock
    return StreamWorker(
        FakeReader(stream),
        FakeSink(stream),
        detector,
        Decoder(1, LimitSettings(), clock),
        clock,
        settings=WorkerSettings(),
    )


async def test_each_ending_is_a_line_that_names_image_category_and_model(written: Written) -> None:
    stream = FakeStream(FakeClock())
    fields = {b"id": b"part-7", b"category": b"bottle"}
    stream.add(Entry("1-1", fields | {b"image": png()}), Entry("1-2", fields | {b"id": b"part-8", b"image": SECRET}))
    await make_worker(stream, FakeDetector()).run_once()
    dead, result = sorted(written.lines(), key=lambda line: str(line["level"]), reverse=True)
    assert (result["level"], result["image_id"], result["category"]) == ("DEBUG", "part-7", "bottle")
    assert (result["model"], result["verdict"], result["entry_id"]) == ("bottle@v1", "anomalous", "1-1")
    assert (dead["level"], dead["image_id"], dead["reason"]) == ("INFO", "part-8", "undecodable")
    assert "the bytes" not in written.text


async def test_a_bug_names_its_image_and_shows_nothing_of_it(written: Written) -> None:
    stream = FakeStream(FakeClock())
    detector = FakeDetector()
    detector.failures = [DetectorOverloadedError("full"), ValueError("a bug")]
    stream.add(Entry("1-1", {b"id": b"part-\xff", b"category": b"bottle", b"image": png()}))
    worker = make_worker(stream, detector)
    await worker.run_once()
    lines = written.lines()
    assert [line["level"] for line in lines] == ["INFO"], "an id that is no text is refused"
    stream.add(image_entry(2))
    await worker.run_once()
    bug = next(line for line in written.lines() if line["level"] == "ERROR")
    assert bug["category"] == "bottle"
    assert bug["image_id"] == bug["entry_id"]
    assert "ValueError: a bug" in bug["error"]
