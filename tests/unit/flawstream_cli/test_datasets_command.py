"""`flawstream datasets`, and how `flawstream train` leaves out or refuses what its check finds before it starts."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.command_line import Run, make_run
from helpers.image_files import write_category, write_image, write_images, write_mask

from flawstream_cli.commands import train as train_module
from flawstream_cli.data_sets import exclude_faulty
from schemas.settings import Settings
from training.datasets.mvtec import load_mvtec


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(monkeypatch, capsys)


def test_check_of_a_sound_data_set_names_the_next_command(run: Run, tmp_path: Path) -> None:
    write_category(tmp_path / "bottle")
    ran = run("datasets", "check", tmp_path)
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "note bottle: masks of 3 images mark 2.92% of their pixels on average, 2.92% to 2.92%"
    ]
    assert "categories: 1, errors: 0, warnings: 0" in ran.err
    assert f"flawstream train {tmp_path}" in ran.err


def test_check_fails_on_errors_and_lists_them_before_warnings(run: Run, tmp_path: Path) -> None:
    write_category(tmp_path / "bottle", train=20)
    (tmp_path / "bottle/train/good/000.png").write_bytes(b"no image")
    ran = run("datasets", "check", tmp_path)
    first, second, note = ran.out.splitlines()
    assert ran.code == 1
    assert first.startswith(f"error bottle: {tmp_path}/bottle/train/good/000.png: 8 bytes that start with")
    assert note.startswith("note bottle: masks of 3 images")
    assert second.startswith("warning bottle: a false alarm rate of 0.05 needs 19 calibration images")
    assert "errors: 1, warnings: 1" in ran.err


def test_check_goes_past_warnings(run: Run, tmp_path: Path) -> None:
    write_category(tmp_path / "bottle", train=20)
    assert run("datasets", "check", tmp_path).code == 0


def test_check_tells_the_first_of_many_and_json_tells_all(run: Run, tmp_path: Path) -> None:
    write_category(tmp_path / "bottle")
    for number in range(8):
        write_mask(tmp_path / "bottle/ground_truth/broken" / f"{100 + number}_mask.png")
    ran = run("datasets", "check", tmp_path)
    assert len(ran.out.splitlines()) == 7
    assert "bottle: and 3 more of this kind" in ran.out
    told = run("datasets", "check", tmp_path, "--json")
    assert told.code == 1
    found = json.loads(told.out)
    assert (found["errors"], found["warnings"], len(found["findings"])) == (8, 0, 9)
    assert found["findings"][0] | {"text": ""} == {
        "severity": "error",
        "category": "bottle",
        "problem": "orphan_mask",
        "path": f"{tmp_path}/bottle/ground_truth/broken/100_mask.png",
        "text": "",
        "count": 1,
    }


def test_check_reports_a_folder_that_is_nearly_a_category(run: Run, tmp_path: Path) -> None:
    write_category(tmp_path / "bottle")
    write_images(tmp_path / "lid/train/gut", 1)
    ran = run("datasets", "check", tmp_path)
    assert ran.code == 0
    assert f"warning {tmp_path}/lid: has train/ without a folder good, normal or ok" in ran.out
    assert f"{tmp_path}/lid" not in run("datasets", "check", tmp_path, "-c", "bottle").out


def test_check_finds_a_registry_that_training_could_not_write(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_category(tmp_path / "data" / "bottle")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLAWSTREAM_REGISTRY__ROOT", str(tmp_path / "file" / "models"))
    ran = run("datasets", "check", tmp_path / "data")
    assert ran.code == 1
    assert ran.out.startswith(f"error {tmp_path}/file/models: is the registry and cannot be written here; ")
    monkeypatch.setenv("FLAWSTREAM_REGISTRY__ROOT", str(tmp_path / "new" / "models"))
    assert run("datasets", "check", tmp_path / "data").code == 0
    assert not (tmp_path / "new").exists()


def test_check_looks_only_at_the_categories_asked_for(run: Run, tmp_path: Path) -> None:
    write_category(tmp_path / "bottle")
    write_images(tmp_path / "lid/train/good", 1)
    assert run("datasets", "check", tmp_path).code == 1
    assert run("datasets", "check", tmp_path, "-c", "bottle").code == 0


def test_check_of_a_wrong_layout_is_refused(run: Run, tmp_path: Path) -> None:
    write_category(tmp_path / "bottle", train=1)
    ran = run("datasets", "check", tmp_path, "--layout", "visa")
    assert ran.code == 3
    assert "is not a data set of layout visa" in ran.err


def test_list_counts_every_category(run: Run, tmp_path: Path) -> None:
    write_category(tmp_path / "bottle", train=12)
    (tmp_path / "bottle/ground_truth/broken/000_mask.png").unlink()
    write_image(tmp_path / "bottle/test/bent/000.png")
    (counted,) = json.loads(run("datasets", "list", tmp_path, "--json").out)
    assert counted == {
        "category": "bottle",
        "train": 12,
        "test_normal": 2,
        "test_defective": 4,
        "masks": 2,
        "defects": {"bent": 1, "broken": 3},
    }
    shown = run("datasets", "list", tmp_path).out
    assert "bent 1, broken 3" in shown


def test_export_of_cifar10_needs_its_source(run: Run, tmp_path: Path) -> None:
    ran = run("datasets", "export", "cifar10", tmp_path / "out")
    assert ran.code == 3
    assert "--source is missing" in ran.err


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replace the cluster: what would have been started is listed, and goes no further."""
    started: list[object] = []

    def start(address: object) -> None:
        started.append(address)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "on_cluster", start)
    return started


@pytest.mark.parametrize("options", [(), ("--no-check",)])
def test_train_refuses_orphan_masks_and_too_few_images_before_a_start(
    run: Run, tmp_path: Path, unstarted: list[object], options: tuple[str, ...]
) -> None:
    write_category(tmp_path / "bottle", train=9)
    write_mask(tmp_path / "bottle/ground_truth/broken/100_mask.png")
    ran = run("train", tmp_path, *options)
    assert ran.code == 3
    assert "9 normal training images; at least 10 are needed" in ran.err
    assert "100_mask.png: is a mask without an image" in ran.err
    assert "nothing is trained: the check of the data set found errors: 2" in ran.err
    assert not unstarted


def test_train_refuses_damaged_images_unless_told_not_to_look(
    run: Run, tmp_path: Path, unstarted: list[object]
) -> None:
    write_category(tmp_path / "bottle")
    (tmp_path / "bottle/train/good/000.png").write_bytes(b"no image")
    assert run("train", tmp_path).code == 3
    assert not unstarted
    assert run("train", tmp_path, "--no-check").code == 130
    assert unstarted == [None]


@pytest.fixture
def one_damaged(tmp_path: Path) -> Path:
    """Give a data set of which one category is sound, one has a damaged image and a leak, and one too few images."""
    for category in ("bottle", "cable"):
        write_category(tmp_path / category)
    (tmp_path / "bottle/train/good/000.png").write_bytes(b"no image")
    shutil.copy(tmp_path / "bottle/train/good/001.png", tmp_path / "bottle/test/good/000.png")
    write_images(tmp_path / "lid/train/good", 9)
    return tmp_path


def test_categories_with_errors_are_left_out_with_the_reason_and_the_way_out(one_damaged: Path) -> None:
    sound, faulty = exclude_faulty(load_mvtec(one_damaged), Settings(), decode=True, strict=False)
    assert [one.name for one in sound] == ["cable"]
    assert list(faulty) == ["bottle", "lid"]
    assert "found errors: 2, the first: " in faulty["bottle"]
    assert f"{one_damaged}/bottle/train/good/000.png: 8 bytes that start with" in faulty["bottle"]
    assert "found errors: 1, the first: 9 normal training images" in faulty["lid"]
    assert faulty["lid"].endswith("then train this category with `-c lid`")


def test_strict_train_starts_nothing_where_one_category_has_an_error(
    run: Run, one_damaged: Path, unstarted: list[object]
) -> None:
    ran = run("train", one_damaged, "--strict")
    assert ran.code == 3
    assert "found errors: 3; fix what is listed above, or train the other categories without --strict" in ran.err
    assert not unstarted
    assert run("train", one_damaged).code == 130
    assert unstarted == [None]


@pytest.mark.parametrize("options", [(), ("--strict",)])
def test_train_starts_nothing_where_every_category_has_errors(
    run: Run, one_damaged: Path, unstarted: list[object], options: tuple[str, ...]
) -> None:
    ran = run("train", one_damaged, "-c", "bottle", "-c", "lid", *options)
    assert ran.code == 3
    assert "error bottle: " in ran.err
    assert "error lid: " in ran.err
    assert "found errors: 3; fix what is listed above\n" in ran.err
    assert not unstarted


def test_train_tells_warnings_and_goes_past_them(run: Run, tmp_path: Path, unstarted: list[object]) -> None:
    write_category(tmp_path / "bottle", train=20)
    ran = run("train", tmp_path)
    assert unstarted == [None]
    assert "warning bottle: a false alarm rate of 0.05 needs 19" in ran.err
