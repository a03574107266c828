"""The settings: one file a section, and the tree of all sections.

A part of the program receives its section and never the tree. Nothing is read at import.
"""

from schemas.settings.api import ApiSettings
from schemas.settings.backlog import BacklogSettings
from schemas.settings.detector import DetectorSettings
from schemas.settings.limits import LimitSettings
from schemas.settings.logs import LoggingSettings
from schemas.settings.metrics import MetricsSettings
from schemas.settings.model import BackboneArithmetic, BitDepth, ModelSettings, Resize
from schemas.settings.redis import RedisSettings
from schemas.settings.references import ReferenceSettings
from schemas.settings.registry import RegistrySettings
from schemas.settings.tracing import TracingSettings
from schemas.settings.training import TrainingSettings
from schemas.settings.tree import ENV_PREFIX, Settings, load_settings, settings_problems
from schemas.settings.worker import WorkerSettings

__all__ = [
    "ENV_PREFIX",
    "ApiSettings",
    "BackboneArithmetic",
    "BacklogSettings",
    "BitDepth",
    "DetectorSettings",
    "LimitSettings",
    "LoggingSettings",
    "MetricsSettings",
    "ModelSettings",
    "RedisSettings",
    "ReferenceSettings",
    "RegistrySettings",
    "Resize",
    "Settings",
    "TracingSettings",
    "TrainingSettings",
    "WorkerSettings",
    "load_settings",
    "settings_problems",
]
