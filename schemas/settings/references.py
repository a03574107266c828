"""Images by reference."""

from pydantic import Field, field_validator

from schemas.references import parse_allowed
from schemas.settings.section import Section


class ReferenceSettings(Section):
    """Images by reference: which may be fetched, and within what limits. None may, unless it is listed here."""

    allow: tuple[str, ...] = Field(
        (),
        description="What a reference must start with: `key:frames:`, `s3://bucket/folder/`, `https://host[:port]/path/`.",
    )
    timeout_s: float = Field(10.0, gt=0, description="Longest time to fetch one image, tries included.")
    tries: int = Field(3, ge=1, le=10, description="Tries before an image that cannot be fetched is a dead letter.")
    concurrency: int = Field(16, ge=1, le=256, description="Images that one worker fetches at once.")

    @field_validator("allow")
    @classmethod
    def _allow_is_read_once_here(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for number, entry in enumerate(allow, 1):
            try:
                parse_allowed(entry)
            except ValueError as error:
                raise ValueError(f"entry {number} of the list cannot be allowed: {error}") from None
        return allow
