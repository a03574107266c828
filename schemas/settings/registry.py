"""Where model versions are kept."""

from pydantic import Field

from schemas.settings.section import Section


class RegistrySettings(Section):
    """Where model versions are kept."""

    root: str = Field(".flawstream/models", description="A folder, or an fsspec URL such as s3://bucket/models.")
