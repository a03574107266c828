"""Which files of a folder are complete, and which are passed over."""

import os
from pathlib import Path

import pytest

from schemas.errors import SourceUnavailableError
from workers.capture import hot_folder
from workers.capture.categories import Categories
from workers.capture.hot_folder import FoundFile, HotFolder, Listing

ANY = Categories("bottle")


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(root: Path, clock: Clock, categories: Categories = ANY, exclude: Path | None = None) -> HotFolder:
    return HotFolder(root, {".png", ".jpg"}, categories, 1.0, exclude=exclude, clock=clock)


def write(file: Path, data: bytes = b"image") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def scan(folder: HotFolder) -> Listing:
    return folder.scan(lambda files: files)


def settled(folder: HotFolder, clock: Clock) -> Listing:
    scan(folder)
    clock.now_s += 1.0
    return scan(folder)


def test_a_file_is_complete_once_it_has_not_changed_for_the_settling_time(tmp_path: Path, clock: Clock) -> None:
    file = write(tmp_path / "a.png", b"half")
    folder = make(tmp_path, clock)
    first = scan(folder)
    assert (first.complete, first.settling) == ([], 1)
    clock.now_s = 0.75
    write(file, b"half and half")
    assert scan(folder).complete == []
    clock.now_s = 1.5  # 0.75 s after the second write
    assert scan(folder).complete == []
    clock.now_s = 1.75
    (found,) = scan(folder).complete
    assert folder.read(found, Listing()) == b"half and half"


def test_a_file_that_a_program_has_open_for_writing_is_not_read(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "a.png"
    folder = make(tmp_path, clock)
    with file.open("wb", buffering=0) as writer:
        writer.write(b"half")
        listing = settled(folder, clock)  # the writer has paused for longer than the settling time
        assert folder.read(listing.complete[0], listing) is None
        assert listing.passed_over == {"open for writing": 1}
    listing = scan(folder)
    assert folder.read(listing.complete[0], listing) == b"half"


def test_a_file_on_a_network_share_is_read_though_no_lease_is_granted_there(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_folder, "_file_system", lambda _path: "cifs")
    with (tmp_path / "a.png").open("wb", buffering=0) as writer:  # what a lease on such a share answers for every file
        writer.write(b"image")
        folder = make(tmp_path, clock)
        listing = settled(folder, clock)
        assert folder.read(listing.complete[0], listing) == b"image"


def test_a_file_that_changes_between_listing_and_reading_is_not_read(tmp_path: Path, clock: Clock) -> None:
    file = write(tmp_path / "a.png", b"first")
    folder = make(tmp_path, clock)
    listing = settled(folder, clock)
    write(file, b"other bytes")
    assert folder.read(listing.complete[0], listing) is None
    assert listing.settling == 1
    file.unlink()
    assert folder.read(listing.complete[0], listing) is None


def test_what_is_no_complete_image_is_counted_by_reason_with_an_example(tmp_path: Path, clock: Clock) -> None:
    outside = write(tmp_path / "outside/secret.png")
    root = tmp_path / "in"
    for name in (".hidden.png", "._a.png", "~a.png", "a.png~", "a.tmp", "a.tmp.png", "a.part.jpg", ".git/a.png"):
        write(root / name)
    write(root / "notes.txt")
    write(root / "begun.png", b"")
    write(root / "line 7/a.png")
    os.mkfifo(root / "pipe.png")
    (root / "link.png").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent, target_is_directory=True)
    write(root / "bottle/good.PNG")
    listing = settled(make(root, clock, Categories()), clock)
    assert [file.path for file in listing.complete] == ["bottle/good.PNG"]
    assert listing.passed_over == {
        "hidden or temporary name": 8,
        "no image by its suffix": 1,
        "empty": 1,
        "no category by its subfolder or a rule": 1,
        "no regular file": 1,
        "symbolic link": 2,
    }
    assert listing.examples["no category by its subfolder or a rule"] == "line 7/a.png"


def test_a_file_replaced_by_a_link_after_the_listing_is_not_read(tmp_path: Path, clock: Clock) -> None:
    outside = write(tmp_path / "outside/secret.png")
    file = write(tmp_path / "in/a.png")
    folder = make(tmp_path / "in", clock)
    listing = settled(folder, clock)
    file.unlink()
    file.symlink_to(outside)
    assert folder.read(listing.complete[0], listing) is None
    assert any(reason.startswith("cannot be read") for reason in listing.passed_over)


def test_files_come_the_oldest_first_from_all_subfolders_but_the_excluded_one(tmp_path: Path, clock: Clock) -> None:
    for age, name in enumerate(("c.png", "x/a.png", "x/y/b.png")):
        file = write(tmp_path / name)
        os.utime(file, (1000 - age, 1000 - age))
    write(tmp_path / "done/d.png")
    listing = settled(make(tmp_path, clock, exclude=tmp_path / "done"), clock)
    assert [file.path for file in listing.complete] == ["x/y/b.png", "x/a.png", "c.png"]


def test_only_so_many_files_are_kept_from_one_listing_the_oldest(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_folder, "_MOST_CANDIDATES", 3)
    for age in range(10):
        file = write(tmp_path / f"{age}.png")
        os.utime(file, (1000 - age, 1000 - age))
    listing = settled(make(tmp_path, clock), clock)
    assert [file.path for file in listing.complete] == ["9.png", "8.png", "7.png"]


def test_a_folder_that_is_away_is_an_error_that_names_it(tmp_path: Path, clock: Clock) -> None:
    folder = make(tmp_path / "gone", clock)
    with pytest.raises(SourceUnavailableError, match=r"gone cannot be read: No such file"):
        scan(folder)


def test_names_of_any_bytes_are_read(tmp_path: Path, clock: Clock) -> None:
    name = os.fsdecode(b"Gr\xfc\xdfe\n\x1b[31m.png")
    write(tmp_path / name)
    folder = make(tmp_path, clock)
    listing = settled(folder, clock)
    assert [file.path for file in listing.complete] == [name]
    assert folder.read(listing.complete[0], listing) == b"image"


def test_a_file_has_changed_once_size_or_time_differ(tmp_path: Path, clock: Clock) -> None:
    file = write(tmp_path / "a.png")
    folder = make(tmp_path, clock)
    found = settled(folder, clock).complete[0]
    assert folder.has(found)
    assert not folder.has(FoundFile("a.png", found.size, found.mtime_ns + 1))
    file.unlink()
    assert not folder.has(found)
