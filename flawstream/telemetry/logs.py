"""Set-up of logging: as text, or as JSON with one object per line.

Fields of a line besides its message come from the logger's `extra`: `image_id`, `category`, `model` and others. Bytes
are never written and long texts are cut, so that an error message cannot put an image into a log.
"""

import logging
from typing import Any

from pythonjsonlogger.defaults import unknown_default
from pythonjsonlogger.json import JsonFormatter

from schemas.errors import escaped
from schemas.settings import LoggingSettings

ROOMS = ("schemas", "flawstream", "workers", "training", "serving", "flawstream_cli")
"""Our packages, which `logging.level` is for. Libraries log from WARNING on."""

_MAX_CHARACTERS = 16_384
_TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(JsonFormatter):
    """One JSON object per line: `level`, `logger`, `message`, the `extra` fields, `error` (a traceback), `time`."""

    def __init__(self) -> None:
        super().__init__(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "error"},
            timestamp="time",
            json_default=_as_json,
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Truncate long values, and escape file names."""
        return {
            name: _shortened(escaped(value)) if isinstance(value, str) else value for name, value in log_data.items()
        }


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ... ({len(text):,} characters)"


def set_up_logging(settings: LoggingSettings) -> None:
    """Configure logging of this process to standard error.

    In text format, existing handlers are kept; a handler is added only if there is none.
    """
    root = logging.getLogger()
    for room in ROOMS:
        logging.getLogger(room).setLevel(settings.level)
    if settings.format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
        for existing in list(root.handlers):
            root.removeHandler(existing)
        root.addHandler(handler)
    elif not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_TEXT_FORMAT))
        root.addHandler(handler)


def are_json() -> bool:
    """Check whether log lines of this process are JSON."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def _as_json(value: object) -> object:
    """Convert values that JSON does not have: bytes to their length, times to ISO 8601, others to text."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes>"
    isoformat = getattr(value, "isoformat", None)
    return isoformat() if callable(isoformat) else unknown_default(value)
