"""What is refused before anything is decoded."""

from pydantic import Field

from schemas.settings.section import MIB, Section


class LimitSettings(Section):
    """What is refused before anything is decoded."""

    max_image_bytes: int = Field(16 * MIB, ge=1024, description="Longest compressed image.")
    max_fields_bytes: int = Field(64 * 1024, ge=256, description="All fields of an entry but the image, together.")
    max_pixels: int = Field(64_000_000, ge=64, description="Largest width times height.")
    max_decoding_bytes: int = Field(
        1024 * MIB, ge=MIB, description="Memory of the images that a process decodes at once; others wait."
    )
    max_aspect: float = Field(32.0, ge=1.0, description="Largest ratio of the longer to the shorter side.")
