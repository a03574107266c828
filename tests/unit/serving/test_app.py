"""The application, before anything of it runs."""

import pytest

from schemas.errors import ConfigError
from schemas.settings import Settings
from serving.app import build


def test_worker_may_not_take_a_slow_detector_for_one_that_hangs() -> None:
    settings = Settings.model_validate({"worker": {"stage_timeout_s": 30.0}, "detector": {"timeout_s": 30.0}})
    with pytest.raises(ConfigError, match=r"stage_timeout_s=30 is not more than detector\.timeout_s=30"):
        build(settings)
    without_workers = settings.model_copy(update={"worker": settings.worker.model_copy(update={"replicas": 0})})
    assert build(without_workers)
