"""`bench.gpu_training` in a tiny form on a CPU, where its steps are no graph."""

from pathlib import Path

import pytest
from helpers import heads as tiny

from bench import gpu_training


@pytest.mark.parametrize("categories", [1, 3])
def test_categories_are_trained_together_and_their_epochs_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, categories: int
) -> None:
    monkeypatch.setattr(gpu_training, "IMAGES", 9)
    store = gpu_training.random_features(tmp_path, tiny.SPEC)
    found = gpu_training.measure_together(tiny.SPEC, tiny.FLOW, store, categories)
    assert found["categories"] == categories
    assert found["images"] == 9
    assert 0 < found["epoch_s"] < found["whole_s"] + 0.01  # rounded
