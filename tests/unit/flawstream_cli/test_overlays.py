"""The pictures of `flawstream watch --save`."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers.fakes import make_result
from numpy.typing import NDArray

from flawstream.imaging.maps import encode_map
from flawstream_cli.overlays import OverlayFolder
from schemas.messages import AnomalyMap, Box, DetectionResult, MapCodec
from schemas.settings import LimitSettings

HEIGHT, WIDTH = 60, 90
BOX = Box(x=40, y=10, width=20, height=30, score=3.0)


def make_map(codec: MapCodec = MapCodec.GRID_F16) -> AnomalyMap:
    """Make a map with a hot quarter, below on the right."""
    grid = np.full((8, 8), 0.1, np.float16)
    grid[4:, 4:] = 40.0
    return encode_map([grid], (32, 32), codec, 1.0)


def result(message_id: str = "a.png", **changes: Any) -> DetectionResult:
    fields: dict[str, Any] = {"image_shape": (HEIGHT, WIDTH), "map": make_map(), **changes}
    return make_result(message_id, **fields)


def write_original(file: Path, pixels: NDArray[Any] | None = None) -> None:
    """Write an image, grey where nothing else is given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
        cv2.imencode(".png", np.full((HEIGHT, WIDTH, 3), 200, np.uint8) if pixels is None else pixels)[1].tobytes()
    )


def draw(
    folder: Path, drawn: DetectionResult, images: Path | None = None, limits: LimitSettings | None = None
) -> tuple[NDArray[Any] | None, list[str]]:
    """Return the (H, W, 3) BGR pixels of a result's picture, if there is one, and the messages."""
    messages: list[str] = []
    OverlayFolder(folder, images, 10, limits or LimitSettings(), messages.append).write("1-0", drawn)
    files = list(folder.iterdir())
    assert len(files) <= 1
    return (cv2.imread(str(files[0])) if files else None), messages


@pytest.mark.parametrize("codec", [MapCodec.GRID_F16, MapCodec.PNG16, MapCodec.HEATMAP_JPEG])
def test_the_picture_has_the_size_of_the_image_and_shows_image_map_and_boxes(tmp_path: Path, codec: MapCodec) -> None:
    write_original(tmp_path / "in/a.png")
    picture, messages = draw(tmp_path / "out", result(map=make_map(codec), boxes=(BOX,)), tmp_path / "in")
    assert messages == []
    assert picture is not None
    assert picture.shape == (HEIGHT, WIDTH, 3)
    blue, _, red = picture[50, 80].astype(int)
    assert red > blue + 30  # hot
    blue, _, red = picture[5, 5].astype(int)
    assert blue > red  # cold
    assert picture[5, 5].min() > 90  # the grey image shines through
    edge = picture[25, 36:44].astype(int).sum(axis=1)
    assert edge.max() > 600  # the box's white line
    assert edge.min() < 200  # and the black one beside it


def test_a_map_alone_is_drawn_at_the_size_that_the_result_states(tmp_path: Path) -> None:
    picture, messages = draw(tmp_path / "out", result())
    assert messages == []
    assert picture is not None
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert picture[50, 80, 2] > 100 > picture[50, 80, 0]


def test_without_map_and_original_the_boxes_are_drawn(tmp_path: Path) -> None:
    picture, _ = draw(tmp_path / "out", result(map=AnomalyMap(codec=MapCodec.NONE), boxes=(BOX,)))
    assert picture is not None
    assert picture[25, 40].min() > 150
    assert picture[25, 50].max() < 50


def test_an_original_of_12_bits_in_16_is_not_black(tmp_path: Path) -> None:
    write_original(tmp_path / "in/a.png", np.full((HEIGHT, WIDTH), 4095, np.uint16))
    picture, messages = draw(tmp_path / "out", result(map=AnomalyMap(codec=MapCodec.NONE)), tmp_path / "in")
    assert messages == []
    assert picture is not None
    assert picture.min() > 240


def test_the_original_is_found_by_the_field_file_of_any_bytes(tmp_path: Path) -> None:
    write_original(Path(str(tmp_path / "in") + "/x/" + b"\xff.png".decode("utf-8", "surrogateescape")))
    drawn = result("7", map=AnomalyMap(codec=MapCodec.NONE), extra={"file": b"x/\xff.png"})
    picture, messages = draw(tmp_path / "out", drawn, tmp_path / "in")
    assert messages == []
    assert picture is not None
    assert picture.min() > 190


@pytest.mark.parametrize("file", [b"../secret.png", b"link.png", b"folder/secret.png", b"a\0b", b"x" * 5000, b"."])
def test_nothing_outside_the_folder_of_originals_is_read(tmp_path: Path, file: bytes) -> None:
    write_original(tmp_path / "secret.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in/folder").symlink_to(tmp_path)
    drawn = result(map=AnomalyMap(codec=MapCodec.NONE), extra={"file": file})
    picture, messages = draw(tmp_path / "out", drawn, tmp_path / "in")
    assert len(messages) == 1
    assert "is drawn without its original" in messages[0]
    assert picture is not None
    assert picture.max() == 0


def test_an_absolute_name_of_an_original_is_not_read(tmp_path: Path) -> None:
    write_original(tmp_path / "secret.png")
    (tmp_path / "in").mkdir()
    _, messages = draw(tmp_path / "out", result(str(tmp_path / "secret.png")), tmp_path / "in")
    assert "has no file of that name" in messages[0]


def test_an_original_of_another_size_or_no_image_is_not_used(tmp_path: Path) -> None:
    write_original(tmp_path / "in/a.png", np.zeros((5, 5, 3), np.uint8))
    (tmp_path / "in/b.png").write_bytes(b"no image")
    _, messages = draw(tmp_path / "out", result(), tmp_path / "in")
    assert "an image of another size" in messages[0]
    _, messages = draw(tmp_path / "other", result("b.png"), tmp_path / "in")
    assert "drawn without its original: 8 bytes" in messages[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"image_shape": (0, 0)},
        {"image_shape": (100_000, 100_000)},
        {"map": AnomalyMap(codec=MapCodec.F16, shape=(32, 32), data=b"short")},
        {"map": AnomalyMap(codec=MapCodec.HEATMAP_JPEG, shape=(32, 32), data=b"no JPEG")},
        {"image_shape": (70_000, 3)},  # more than a JPEG can have
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_reported_and_nothing_is_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    picture, messages = draw(tmp_path / "out", result(**changes))
    assert picture is None
    assert len(messages) == 1
    assert messages[0].startswith("a.png is not drawn: ")


@pytest.mark.parametrize(
    ("message_id", "name"),
    [
        ("camera7-45", "camera7-45_1-0.jpg"),
        ("../../etc/passwd", "_.._etc_passwd_1-0.jpg"),
        ("..", "image_1-0.jpg"),
        ("line 7/Größe\n.png", "line_7_Gr_e_.png_1-0.jpg"),
        ("x" * 256, "x" * 100 + "_1-0.jpg"),
    ],
)
def test_a_picture_is_named_by_its_id_without_what_a_path_could_hold(
    tmp_path: Path, message_id: str, name: str
) -> None:
    draw(tmp_path / "out", result(message_id))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [name]


def test_only_the_newest_pictures_are_kept_also_after_a_restart_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_bytes(b"")
    for first in (8, 11):
        folder = OverlayFolder(tmp_path, None, 3, LimitSettings(), print)
        for number in range(first, first + 3):
            folder.write(f"{number}-0", result("a"))
        folder.write(f"{first + 2}-0", result("a"))  # the same again
    folder.write("1:14-0", result("a"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a_1-14-0.jpg", "a_12-0.jpg", "a_13-0.jpg", "notes.jpg"]
