"""How log lines leave a process: for a person, or as JSON for a program, one object a line.

What stands in a line besides its message is handed to the logger as `extra`: `image_id`, `category`, `model` and their
like. Bytes are never written, and nothing at any length: an image must not reach a log by way of an error's text.
"""

import logging
from typing import Any

from pythonjsonlogger.defaults import unknown_default
from pythonjsonlogger.json import JsonFormatter

from schemas.settings import LoggingSettings

ROOMS = ("schemas", "flawstream", "workers", "training", "serving", "flawstream_cli")
"""Our packages: the level is for what they say. Libraries are heard from WARNING on."""

_LONGEST = 16_384
_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(JsonFormatter):
    """One JSON object a line: `level`, `logger`, `message`, what came as `extra`, `error` (a traceback), `time`."""

    def __init__(self) -> None:
        super().__init__(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "error"},
            timestamp="time",
            json_default=_as_json,
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Cut what is too long."""
        return {
            name: f"{value[:_LONGEST]} ... ({len(value):,} characters)"
            if isinstance(value, str) and len(value) > _LONGEST
            else value
            for name, value in log_data.items()
        }


def set_up_logging(settings: LoggingSettings) -> None:
    """Have log lines of this process written to standard error as the settings ask.

    As text they go to the handlers that are there, or to one for a person where there is none.
    """
    root = logging.getLogger()
    for room in ROOMS:
        logging.getLogger(room).setLevel(settings.level)
    if settings.format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
        for former in list(root.handlers):
            root.removeHandler(former)
        root.addHandler(handler)
    elif not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_LINE))
        root.addHandler(handler)


def are_json() -> bool:
    """Tell whether log lines of this process are JSON."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def _as_json(value: object) -> object:
    """Write what JSON does not know: bytes by their length, times as ISO 8601, all else as Python writes it."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes>"
    isoformat = getattr(value, "isoformat", None)
    return isoformat() if callable(isoformat) else unknown_default(value)
