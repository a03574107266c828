"""The one tree of settings: defaults, then a YAML file, then `FLAWSTREAM_<SECTION>__<FIELD>` in the environment."""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from schemas.errors import ConfigError
from schemas.settings.api import ApiSettings
from schemas.settings.backlog import BacklogSettings
from schemas.settings.detector import DetectorSettings
from schemas.settings.limits import LimitSettings
from schemas.settings.logs import LoggingSettings
from schemas.settings.metrics import MetricsSettings
from schemas.settings.model import ModelSettings
from schemas.settings.redis import RedisSettings
from schemas.settings.references import ReferenceSettings
from schemas.settings.registry import RegistrySettings
from schemas.settings.tracing import TracingSettings
from schemas.settings.training import TrainingSettings
from schemas.settings.worker import WorkerSettings

ENV_PREFIX = "FLAWSTREAM_"

_SERVICE_LINK = re.compile(
    r"_SERVICE_HOST=|_SERVICE_PORT(_\w+)?=\d+$|_PORT(_\d+_(TCP|UDP|SCTP))?=\w+://|_PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)="
)
"""Variables that Kubernetes sets in every pod for a Service whose name starts with flawstream: not settings."""


class Settings(BaseSettings):
    """All of flawstream's settings."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    redis: RedisSettings = RedisSettings()
    limits: LimitSettings = LimitSettings()
    references: ReferenceSettings = ReferenceSettings()
    backlog: BacklogSettings = BacklogSettings()
    worker: WorkerSettings = WorkerSettings()
    detector: DetectorSettings = DetectorSettings()
    api: ApiSettings = ApiSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    registry: RegistrySettings = RegistrySettings()
    metrics: MetricsSettings = MetricsSettings()
    logging: LoggingSettings = LoggingSettings()
    tracing: TracingSettings = TracingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Give the environment priority over the arguments, which come from the YAML file."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings


def load_settings(path: Path | None = None) -> Settings:
    """Load the settings; the environment has priority over the file.

    Args:
        path: A YAML file of sections; absent: `FLAWSTREAM_CONFIG` names one, or none is read.

    Raises:
        ConfigError: The file cannot be read, a name is unknown, or a value is out of bounds.
    """
    _refuse_unknown_sections()
    named = path or os.environ.get(f"{ENV_PREFIX}CONFIG")
    from_file: dict[str, Any] = {}
    if named:
        try:
            from_file = yaml.safe_load(Path(named).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the settings file {named}: {error}") from error
        if not isinstance(from_file, dict) or not all(isinstance(section, str) for section in from_file):
            raise ConfigError(f"the settings file {named} must hold sections by name, such as `redis:`")
    try:
        return Settings(**from_file)
    except SettingsError as error:  # a variable that must be JSON and is not; the value may be a secret: not printed
        raise ConfigError(f"the environment's settings cannot be read: {error}") from None
    except ValidationError as error:
        raise ConfigError(
            f"settings refused: {settings_problems(error)}. `flawstream doctor --settings` lists every field"
        ) from None


def settings_problems(error: ValidationError, *section: str) -> str:
    """Return which fields are wrong and why, never with their values: one may be a password.

    Args:
        error: pydantic's error.
        *section: The section's name, where only a section was loaded.
    """
    return "; ".join(
        f"{'.'.join(map(str, (*section, *problem['loc'])))}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)
    )


def _refuse_unknown_sections() -> None:
    """Raise for a variable whose section has a typo: pydantic-settings silently ignores it."""
    known = set(Settings.model_fields) | {"config"}
    for name, value in os.environ.items():
        if name.upper().startswith(ENV_PREFIX) and not _SERVICE_LINK.search(f"{name}={value}"):
            section = name[len(ENV_PREFIX) :].split("__")[0].lower()
            if section not in known:
                close = get_close_matches(section, known, n=1)
                hint = f"; did you mean {ENV_PREFIX}{close[0].upper()}?" if close else ""
                raise ConfigError(f"the environment sets {name}, and there is no section {section!r}{hint}")
