"""A category with few images, by the command line: what `evaluate` reports is what a worker on the stream flags.

The short form of `make bench-verdicts`.
"""

from pathlib import Path

import pytest

from bench.verdicts import compare, write_cut
from training.datasets.elpv import export_elpv
from training.datasets.mvtec import load_mvtec

pytestmark = pytest.mark.timeout(900)

LEAST_AUROC = 0.85
THRESHOLD_OF_MANY = 1.6
"""Of all 412 training images (docs/benchmarks/verdicts.md)."""


def test_sixteen_images_give_a_recall_that_the_stream_keeps(tmp_path: Path) -> None:
    (cells,) = load_mvtec(export_elpv(tmp_path / "elpv"), ["mono"])
    write_cut(cells, tmp_path / "data", 16, seed=0, test_images=50)
    for found in compare(tmp_path, "mono-16", "mono", ["ncnn", "torch"], {}):
        assert found.is_equal, found
        assert found.recall == pytest.approx(found.evaluated["recall"], abs=1e-9)
        assert found.evaluated["image_auroc"] >= LEAST_AUROC
        assert found.evaluated["threshold"] < 10 * THRESHOLD_OF_MANY
        low, high = found.evaluated["expected_false_alarm_rate"]
        assert low <= found.evaluated["false_alarm_rate"] <= high
