"""Remembers which files of a folder were pushed, in an SQLite file, so that a restart pushes none again."""

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from schemas.errors import ConfigError, SourceUnavailableError
from workers.capture.hot_folder import FoundFile

_FORMAT = 1
_PAGE = 500
_TABLE = """
CREATE TABLE IF NOT EXISTS files (
  path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
  message_id TEXT NOT NULL, refusal TEXT NOT NULL, at_s REAL NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of a file.

    Attributes:
        file: The file as it was pushed; one that has changed since is another.
        message_id: The id that it was pushed with; empty where it was refused before.
        refusal: Why it was refused; empty where it was pushed.
        at_s: When, seconds since 1970.
    """

    file: FoundFile
    message_id: str
    refusal: str
    at_s: float


class Ledger:
    """What became of each file of a folder. One process at a time has it open.

    Args:
        file: The SQLite file, made where it is missing.

    Raises:
        ConfigError: Another process has it open, or it is no ledger.
        SourceUnavailableError: It cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the ledger's folder {file.parent} cannot be made: {error.strerror}") from error
        with self._errors():
            self._sql = sqlite3.connect(file, timeout=0.0, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._sql.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sql.close()

    def __len__(self) -> int:
        with self._errors():
            return int(self._sql.execute("SELECT count(*) FROM files").fetchone()[0])

    def unknown(self, files: list[FoundFile]) -> list[FoundFile]:
        """Return the files that the ledger does not have, or has with another size or time of change."""
        with self._errors():
            rows = self._sql.execute(
                f"SELECT path, size, mtime_ns FROM files WHERE path IN ({','.join('?' * len(files))})",  # noqa: S608 - only ?
                [os.fsencode(file.path) for file in files],
            )
            known = {FoundFile(os.fsdecode(path), size, mtime_ns) for path, size, mtime_ns in rows}
        return [file for file in files if file not in known]

    def record(self, outcomes: Iterable[tuple[FoundFile, str, str]]) -> None:
        """Record what became of files, all or none.

        Args:
            outcomes: File, message id, and why it was refused, empty where it was pushed.
        """
        now_s = time.time()
        rows = [(os.fsencode(f.path), f.size, f.mtime_ns, message_id, why, now_s) for f, message_id, why in outcomes]
        with self._transaction():
            self._sql.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)

    def forget(self, files: Iterable[FoundFile]) -> None:
        """Delete files from the ledger."""
        with self._transaction():
            self._sql.executemany("DELETE FROM files WHERE path = ?", [(os.fsencode(file.path),) for file in files])

    def pages(self) -> Iterator[list[Entry]]:
        """Yield all entries by path, in bounded pages; entries may be forgotten meanwhile."""
        after = b""
        while True:
            with self._errors():
                rows = self._sql.execute(
                    "SELECT * FROM files WHERE path > ? ORDER BY path LIMIT ?", (after, _PAGE)
                ).fetchall()
            if not rows:
                return
            yield [Entry(FoundFile(os.fsdecode(path), size, mtime), *rest) for path, size, mtime, *rest in rows]
            after = rows[-1][0]

    def _open(self) -> None:
        self._sql.execute("PRAGMA locking_mode = EXCLUSIVE")  # before WAL, which then needs no shared memory
        self._sql.execute("PRAGMA journal_mode = WAL")
        self._sql.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():  # locks the file for this process
            (version,) = self._sql.execute("PRAGMA user_version").fetchone()
            if version not in (0, _FORMAT):
                raise ConfigError(f"the ledger {self._file} has format {version} and this flawstream reads {_FORMAT}")
            self._sql.execute(_TABLE)
            self._sql.execute(f"PRAGMA user_version = {_FORMAT}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._sql.execute("ROLLBACK")
                raise
            self._sql.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ConfigError(
                    f"another process has the ledger {self._file} open; one `flawstream capture` a folder, "
                    "or name another ledger"
                ) from error
            raise SourceUnavailableError(f"the ledger {self._file} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{self._file} is no ledger of flawstream, or is damaged: {error}; move it away, and every file that "
                "is still in the folder is pushed again"
            ) from error
