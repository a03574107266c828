"""Log lines."""

from typing import Literal

from pydantic import Field

from schemas.settings.section import Section


class LoggingSettings(Section):
    """Log lines, on standard error."""

    format: Literal["text", "json"] = Field(
        "text", description="`text` for a person; `json`: one object a line, as the image has it."
    )
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "WARNING",
        description="Lowest level logged: INFO logs each dead letter, DEBUG each result; libraries from WARNING on.",
    )
