"""The solar cells as folders: the counts, the split, and whole or not at all."""

import sys
from pathlib import Path

import pytest

from schemas.errors import ConfigError, DatasetError
from training.datasets import elpv
from training.datasets.elpv import export_elpv
from training.datasets.mvtec import load_mvtec


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("elpv_dataset", reason="the demo's extra is not installed")
    return export_elpv(tmp_path_factory.mktemp("elpv") / "cells")


def test_counts_are_those_of_the_data_set(exported: Path) -> None:
    counts = {
        data.name: (
            len(data.train),
            sum(not sample.anomalous for sample in data.test),
            sum(sample.anomalous for sample in data.test),
        )
        for data in load_mvtec(exported)
    }
    assert counts == {"mono": (412, 176, 313), "poly": (644, 276, 402)}


def test_no_cell_both_trains_and_tests(exported: Path) -> None:
    for data in load_mvtec(exported):
        tested = {sample.path.name for sample in data.test}
        assert not tested & {path.name for path in data.train}
        assert len(tested) == len(data.test)


def test_split_is_the_same_everywhere(exported: Path) -> None:
    tested = [sample.path.name for sample in load_mvtec(exported, ["mono"])[0].test if not sample.anomalous]
    assert tested[:4] == ["cell0009.png", "cell0423.png", "cell0447.png", "cell0465.png"]


def test_second_call_does_nothing(exported: Path) -> None:
    before = exported.stat().st_mtime_ns
    assert export_elpv(exported) == exported
    assert exported.stat().st_mtime_ns == before
    assert [path.name for path in exported.parent.iterdir()] == ["cells"]


def test_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elpv, "_build", lambda _, folder: (folder / "mono").mkdir(parents=True))
    (tmp_path / "empty").mkdir()
    assert (export_elpv(tmp_path / "empty") / "mono").is_dir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(DatasetError, match="has other content"):
        export_elpv(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("elpv_dataset", reason="the demo's extra is not installed")

    def fail(_: object, names: object, folder: Path) -> None:
        folder.mkdir(parents=True)
        raise OSError(28, f"No space left on device for {names}"[:40])

    monkeypatch.setattr(elpv, "_copy", fail)
    with pytest.raises(DatasetError, match="No space left"):
        export_elpv(tmp_path / "cells")
    assert list(tmp_path.iterdir()) == []


def test_absent_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "elpv_dataset", raising=False)
    monkeypatch.setattr(elpv, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'flawstream\[demo\]'"):
        export_elpv(tmp_path / "cells")
