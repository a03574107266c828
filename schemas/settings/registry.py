"""Where model versions are kept."""

from pydantic import Field

from schemas.settings.section import PathOrUrl, Section


class RegistrySettings(Section):
    """Where model versions are kept."""

    root: PathOrUrl = Field(".flawstream/models", description="A folder, or an fsspec URL such as s3://bucket/models.")
    max_auroc_drop: float = Field(
        0.02,
        ge=0,
        le=1,
        description="`flawstream train` does not promote a version whose AUROC on test images is this much lower than "
        "that of the current version, unless --force is given. 1: any is promoted.",
    )
    max_false_alarm_rise: float = Field(
        0.05,
        ge=0,
        le=1,
        description="The same for the share of normal test images above the threshold, when it is this much higher.",
    )
