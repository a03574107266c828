"""The ledger of a folder's files."""

import os
import sqlite3
from pathlib import Path

import pytest

from schemas.errors import ConfigError, SourceUnavailableError
from workers.capture.hot_folder import FoundFile
from workers.capture.ledger import Ledger


def files(count: int) -> list[FoundFile]:
    return [FoundFile(os.fsdecode(b"\xff/%05d.png" % k), k + 1, k) for k in range(count)]


def test_files_are_known_after_a_restart_by_path_size_and_time(tmp_path: Path) -> None:
    first, second, third = files(3)
    with Ledger(tmp_path / "new/ledger.sqlite") as ledger:
        ledger.record([(first, "a", ""), (second, "", "too large")])
    with Ledger(tmp_path / "new/ledger.sqlite") as ledger:
        assert len(ledger) == 2
        changed = FoundFile(first.path, first.size, first.mtime_ns + 1)
        grown = FoundFile(second.path, second.size + 1, second.mtime_ns)
        assert ledger.unknown([first, second, third, changed, grown]) == [third, changed, grown]
        (page,) = ledger.pages()
        assert [(entry.file, entry.message_id, entry.refusal) for entry in page] == [
            (first, "a", ""),
            (second, "", "too large"),
        ]


def test_pages_hold_all_entries_though_they_are_forgotten_meanwhile(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record((file, "id", "") for file in files(1203))
        seen = []
        for page in ledger.pages():
            assert len(page) <= 500
            seen += [entry.file for entry in page]
            ledger.forget(entry.file for entry in page)
        assert seen == files(1203)
        assert len(ledger) == 0


def test_nothing_of_a_batch_is_recorded_where_a_part_cannot_be(tmp_path: Path) -> None:
    first, second, _ = files(3)
    too_large = FoundFile(second.path, 1 << 70, 0)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(OverflowError):
            ledger.record([(first, "a", ""), (too_large, "b", "")])
        assert ledger.unknown([first]) == [first]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite"), pytest.raises(ConfigError, match="another process has the ledger"):
        Ledger(tmp_path / "ledger.sqlite")


def test_what_is_no_ledger_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    other.write_bytes(b"no database " * 100)
    with pytest.raises(ConfigError, match="is no ledger of flawstream, or is damaged"):
        Ledger(other)
    assert other.read_bytes() == b"no database " * 100


def test_a_ledger_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.sqlite") as sql:
        sql.execute("PRAGMA user_version = 2")
    sql.close()
    with pytest.raises(ConfigError, match="has format 2"):
        Ledger(tmp_path / "ledger.sqlite")


def test_a_ledger_that_cannot_be_written_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(SourceUnavailableError, match=r"folder\.sqlite cannot be used"):
        Ledger(tmp_path / "folder.sqlite")
