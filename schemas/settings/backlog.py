"""Admission control of producers, and retention of results."""

from pydantic import Field

from schemas.settings.section import MIB, Section


class BacklogSettings(Section):
    """When producers are refused, and what is kept of the results. All per shard."""

    max_images: int = Field(10_000, ge=1, description="Entries on the images stream past which a push is refused.")
    max_bytes: int = Field(
        2048 * MIB,
        ge=MIB,
        description="Bytes of the images stream, as the server estimates, past which a push is refused.",
    )
    keep_results: int = Field(
        100_000,
        ge=1,
        description="Results kept on the stream; older ones go, but never what a registered group has yet to read.",
    )
    keep_results_s: float = Field(
        7 * 86_400.0,
        gt=0,
        description="Age past which a result goes, be the stream short or long; never what a group has yet to read.",
    )
