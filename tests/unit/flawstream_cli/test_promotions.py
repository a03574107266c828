"""Versions worse than the current ones are written and not promoted, unless somebody forces it."""

from pathlib import Path

import pytest
from helpers.tiny_models import make_manifest

from flawstream.registry.registry import Registry
from flawstream_cli.promotions import Promotions
from schemas.errors import ConfigError
from schemas.manifest import EvaluationMetrics, ModelManifest
from schemas.settings.registry import RegistrySettings
from training.preflight import require_writable

GOOD = EvaluationMetrics(image_auroc=0.95, false_alarm_rate=0.05)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path))


def write(registry: Registry, version: str, metrics: EvaluationMetrics) -> ModelManifest:
    manifest = make_manifest("bottle", version).model_copy(update={"metrics": metrics})
    registry.write(manifest, {})
    return manifest


def promote(registry: Registry, manifest: ModelManifest, *, force: bool = False) -> dict[str, str]:
    promotions = Promotions(RegistrySettings(root=registry.root), force=force)
    promotions.add([manifest])
    promotions.close()
    return promotions.refused


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        (EvaluationMetrics(image_auroc=0.929, false_alarm_rate=0.05), "its AUROC is 0.929, and 0.950 with v1"),
        (EvaluationMetrics(image_auroc=0.99, false_alarm_rate=0.11), "its threshold calls 11.0% of normal test images"),
    ],
)
def test_worse_version_is_not_promoted(registry: Registry, metrics: EvaluationMetrics, text: str) -> None:
    promote(registry, write(registry, "v1", GOOD))
    refused = promote(registry, write(registry, "v2", metrics))
    assert text in refused["bottle"]
    assert "flawstream models promote bottle v2" in refused["bottle"]
    assert registry.currents() == {"bottle": "v1"}


@pytest.mark.parametrize(
    "metrics",
    [
        EvaluationMetrics(image_auroc=0.931, false_alarm_rate=0.099),
        EvaluationMetrics(image_auroc=0.99, false_alarm_rate=0.0),
        EvaluationMetrics(false_alarm_rate=0.06),
        EvaluationMetrics(),
    ],
)
def test_version_within_the_margins_or_without_metrics_is_promoted(
    registry: Registry, metrics: EvaluationMetrics
) -> None:
    promote(registry, write(registry, "v1", GOOD))
    assert promote(registry, write(registry, "v2", metrics)) == {}
    assert registry.currents() == {"bottle": "v2"}


def test_force_promotes_a_worse_version_and_says_who(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOGNAME", "ana")
    promote(registry, write(registry, "v1", GOOD))
    worse = write(registry, "v2", EvaluationMetrics(image_auroc=0.5))
    assert promote(registry, worse, force=True) == {}
    assert registry.currents() == {"bottle": "v2"}
    assert "ana has bottle@v2 promoted with --force: its AUROC is 0.500" in " ".join(capsys.readouterr().err.split())


def test_current_version_that_cannot_be_read_is_no_measure(registry: Registry, tmp_path: Path) -> None:
    promote(registry, write(registry, "v1", GOOD))
    (tmp_path / "bottle/v1/manifest.json").write_text("{")
    assert promote(registry, write(registry, "v2", EvaluationMetrics(image_auroc=0.5))) == {}
    assert registry.currents() == {"bottle": "v2"}


def test_registry_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written here"):
        require_writable(str(tmp_path / "file"))
    require_writable(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []
