"""The plain top-level names are ours alone."""

from importlib.metadata import packages_distributions

ROOMS = ("schemas", "flawstream", "workers", "training", "serving", "flawstream_cli")


def test_every_room_belongs_to_this_distribution_only() -> None:
    owners = packages_distributions()
    assert {room: set(owners[room]) - {"flawstream"} for room in ROOMS} == {room: set() for room in ROOMS}
