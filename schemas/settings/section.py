"""The base classes of the sections of the settings."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MIB = 1 << 20

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


def _at_home(path: str) -> str:
    """Expand `~` and `~user`, which a shell does not do in a file of settings or a variable.

    Raises:
        ValueError: There is no such user, or no home.
    """
    expanded = os.path.expanduser(path)  # noqa: PTH111 - a URL must stay as it is
    if expanded.startswith("~"):
        raise ValueError("a path starts with ~, and that home is not known here; write the whole path")
    return expanded


FilePath = Annotated[Path, AfterValidator(lambda path: Path(_at_home(str(path))))]
"""A path of this machine; `~` is the home of the user."""
PathOrUrl = Annotated[str, AfterValidator(_at_home)]
"""A path, with `~` as the home of the user, or anything else, which stays as it is."""


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
