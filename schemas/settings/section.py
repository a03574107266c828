"""The base classes of the sections of the settings."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MIB = 1 << 20

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class Section(BaseModel):
    """A section: frozen, refuses unknown fields, and never shows values in errors, as one may be a password."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ScaledSection(Section):
    """A section of something that runs in replicas."""

    replicas: int = Field(1, ge=0, description="Replicas to run; with max_replicas the fewest.")
    max_replicas: int | None = Field(
        None,
        ge=1,
        description="Most replicas; with it their number follows the images that arrive, between replicas and this.",
    )
    catch_up_s: float = Field(
        60.0, gt=0, description="With max_replicas: time in which images that wait are to be done, by more replicas."
    )
    num_cpus: float = Field(0.0, ge=0, description="CPUs that Ray reserves for a replica.")
