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


@pytest.mark.parametrize(("drain_s", "least_s"), [(1.0, 30.0), (120.0, 120.0)])
def test_serve_waits_for_a_worker_as_long_as_it_may_drain(drain_s: float, least_s: float) -> None:
    settings = Settings.model_validate({"worker": {"drain_s": drain_s}})
    _, workers = build(settings)._bound_deployment.init_args[1:]  # noqa: SLF001 - what Serve is given
    assert workers._bound_deployment._deployment_config.graceful_shutdown_timeout_s > least_s - 0.1  # noqa: SLF001
