"""Finds the images that kill the process which scores them, so that no run meets them for ever.

An attempt at a part is noted in a file before it begins, and the file goes once the part is written: a file that is
there at the beginning is of an attempt that died. After two of those the images are scored alone, each noted before,
and one that was alone in two deaths is not scored again. Deaths of other causes are harmless: they make a part slower.
"""

from pydantic import BaseModel, ConfigDict, ValidationError

from flawstream.storage import Location, read_file, remove_file, write_file
from schemas.errors import Reason
from workers.ports import Refusal

_DEATHS_TOGETHER = 2
_DEATHS_ALONE = 2


class _Note(BaseModel):
    """What is known of the attempts at a part.

    Attributes:
        deaths: How many attempts died.
        alone: The row that is scored alone now.
        deaths_alone: By row, how many attempts died while it was scored alone.
    """

    model_config = ConfigDict(extra="forbid")

    deaths: int = 0
    alone: int | None = None
    deaths_alone: dict[int, int] = {}


class Attempt:
    """One attempt at a part.

    Args:
        file: Where the attempt is noted.
    """

    def __init__(self, file: Location) -> None:
        self._file = file
        self._note = _Note()
        if (data := read_file(file)) is not None:
            try:
                self._note = _Note.model_validate_json(data)
            except ValidationError:
                self._note = _Note()
            self._note.deaths += 1
            if (row := self._note.alone) is not None:
                self._note.deaths_alone[row] = self._note.deaths_alone.get(row, 0) + 1
                self._note.alone = None
        self._write()

    @property
    def is_careful(self) -> bool:
        """Whether to score the images alone."""
        return self._note.deaths >= _DEATHS_TOGETHER

    def begin_alone(self, row: int) -> Refusal | None:
        """Note the row that is scored alone next; gives a refusal if it is not to be scored again."""
        if self._note.deaths_alone.get(row, 0) >= _DEATHS_ALONE:
            return Refusal(
                Reason.POISON,
                f"{_DEATHS_ALONE} processes died while they scored this image alone; the nodes' logs say how",
            )
        self._note.alone = row
        self._write()
        return None

    def end(self) -> None:
        """Remove the note: the part is written, or failed with an error and not with its process."""
        remove_file(self._file)

    def _write(self) -> None:
        write_file(self._file, self._note.model_dump_json().encode())
