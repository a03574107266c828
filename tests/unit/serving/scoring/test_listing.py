"""Which images a URL lists, with which category: folders, patterns, lists, single files."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError
from serving.scoring.listing import FOLDER, ListedImage, Source, list_images

SUFFIXES = (".jpg", ".png")


def listed(url: object, category: str | None = None, category_from: str | None = None) -> list[ListedImage]:
    return list(list_images(Source(str(url), SUFFIXES, category, category_from)))


def names(images: list[ListedImage], root: Path) -> list[str]:
    return [image.path.removeprefix(f"{root}/") for image in images]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "bottle/2026/b.png",
        "bottle/2026/a.PNG",
        "bottle/notes.txt",
        "bottle/.hidden.png",
        ".thumbnails/a.png",
        "cable/c.jpg",
        "top.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_folder_lists_its_images_by_name_and_not_hidden_ones(tree: Path) -> None:
    images = listed(tree, "bottle")
    assert names(images, tree) == ["bottle/2026/a.PNG", "bottle/2026/b.png", "cable/c.jpg", "top.png"]
    assert {image.category for image in images} == {"bottle"}


def test_category_is_the_first_folder_below_the_url(tree: Path) -> None:
    images = listed(tree, category_from=FOLDER)
    assert [image.category for image in images] == ["bottle", "bottle", "cable", ""]


def test_pattern_lists_what_matches_and_its_categories_start_below_the_fixed_part(tree: Path) -> None:
    images = listed(tree / "*" / "**" / "*.png", category_from=FOLDER)
    assert [(name, image.category) for name, image in zip(names(images, tree), images, strict=True)] == [
        ("bottle/2026/b.png", "bottle")
    ]


def test_existing_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "line [7]").mkdir()
    (tmp_path / "line [7]" / "a.png").write_bytes(b"x")
    assert names(listed(tmp_path / "line [7]", "bottle"), tmp_path) == ["line [7]/a.png"]


def test_one_file_is_a_listing_of_one(tree: Path) -> None:
    assert names(listed(tree / "cable" / "c.jpg", "cable"), tree) == ["cable/c.jpg"]


def test_links_to_folders_are_not_followed(tree: Path) -> None:
    (tree / "cable" / "loop").symlink_to(tree)
    assert len(listed(tree, "bottle")) == 4


def test_text_list_names_images_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"bottle/a b.png\r\n\n/else/c.bin\ns3://bucket/d.png\nodd\xff.png\n")
    images = listed(tmp_path / "list.txt", category_from=FOLDER)
    assert names(images, tmp_path) == ["bottle/a b.png", "/else/c.bin", "s3://bucket/d.png", "odd\udcff.png"]
    assert [image.category for image in images] == ["bottle", "", "", ""]


def test_parquet_list_has_a_column_of_paths_and_may_have_one_of_categories(tmp_path: Path) -> None:
    table = pa.table({"url": ["a.png", "s3://b/c.png", None], "part": ["bottle", None, "cable"]})
    pq.write_table(table, tmp_path / "list.parquet")
    assert listed(tmp_path / "list.parquet", category_from="part") == [
        (f"{tmp_path}/a.png", "bottle"),
        ("s3://b/c.png", ""),
        (f"{tmp_path}/", "cable"),
    ]
    assert [image.category for image in listed(tmp_path / "list.parquet", "tile")] == ["tile"] * 3


@pytest.mark.parametrize(
    ("name", "content", "category_from", "reason"),
    [
        ("absent", None, None, "there is nothing at"),
        ("list.txt", b"a.png\n", "part", "only a Parquet list has columns"),
        ("list.parquet", b"not parquet", None, "not a list of images in Parquet"),
        ("list.parquet", {"name": ["a"]}, None, "no column path; it has name"),
        ("list.parquet", {"path": ["a"]}, "part", "no column part; it has path"),
    ],
)
def test_what_cannot_be_listed_is_refused(
    tmp_path: Path, name: str, content: bytes | dict[str, list[str]] | None, category_from: str | None, reason: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        pq.write_table(pa.table(content), tmp_path / name)
    with pytest.raises(ConfigError, match=reason):
        listed(tmp_path / name, None if category_from else "bottle", category_from)


@pytest.mark.parametrize(
    ("url", "reason"),
    [("nothing://bucket", "neither a path nor a URL"), ("zip://a::http://host/b.zip", "chains URLs")],
)
def test_url_that_is_no_storage_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        listed(url, "bottle")


def test_name_that_is_not_utf8_is_listed(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/odd\xff.png"
    with open(path, "wb") as file:  # noqa: PTH123 - a name of bytes
        file.write(b"x")
    assert [os.fsencode(image.path) for image in listed(tmp_path, "bottle")] == [path]
