"""Numbers that are computed from a measurement of the streams; no server."""

from dataclasses import replace

import pytest

from workers.observe.backlog import BacklogState

STATE = BacklogState(
    images=100, pending=40, lag=60, oldest_s=1.0, results=0, dead=0, counters={"duplicates": 5}, delivered=900
)


def test_images_that_were_not_delivered_wait_and_have_arrived_like_those_that_were() -> None:
    assert (STATE.waiting, STATE.arrived, STATE.refused) == (60, 960, 0)


def test_images_that_somebody_deleted_are_pending_and_do_not_make_the_number_negative() -> None:
    assert replace(STATE, images=0).waiting == 0


@pytest.mark.parametrize(("changes", "orphans"), [({}, 0), ({"lag": 53}, 7), ({"lag": None}, None), ({"images": 0}, 0)])
def test_images_that_are_neither_pending_nor_undelivered_are_orphans(
    changes: dict[str, int | None], orphans: int | None
) -> None:
    assert replace(STATE, **changes).orphans == orphans  # type: ignore[arg-type]  # of these two fields


def test_arrivals_are_unknown_where_the_server_does_not_count_deliveries() -> None:
    assert replace(STATE, delivered=None).arrived is None


@pytest.mark.parametrize("name", ["refused_images", "refused_bytes", "refused_memory"])
def test_every_kind_of_refusal_counts(name: str) -> None:
    assert replace(STATE, counters={"duplicates": 5, name: 7, "trimmed_results": 3}).refused == 7
