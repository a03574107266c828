"""How a cluster is shared out among actors: every one of them must fit on some node."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.fleet import share_cluster


@pytest.mark.parametrize(
    ("nodes", "jobs", "gpus", "expected"),
    [
        ([{"CPU": 8.0}], 1, 0, (1, 8)),
        ([{"CPU": 8.0}], 3, 0, (3, 2)),
        ([{"CPU": 2.0}], 5, 0, (2, 1)),
        ([{"CPU": 16.0}] * 4, 1, 0, (1, 16)),  # and not 64, which no node has
        ([{"CPU": 4.0}] * 3, 2, 0, (2, 4)),
        ([{"CPU": 3.0}] * 2, 3, 0, (3, 1)),
        ([{"CPU": 0.0}, {"CPU": 4.0}], 1, 0, (1, 4)),  # a head node that runs nothing
        ([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}], 9, 1, (2, 8)),
        ([{"CPU": 16.0, "GPU": 1.0}], 9, 0.25, (4, 4)),
        ([{"CPU": 2.0, "GPU": 8.0}], 9, 1, (2, 1)),
        ([{"CPU": 16.0, "GPU": 1.0}] * 2, 2, 2, (1, 1)),  # no node has 2: a larger one may join
        ([], 2, 0, (1, 1)),
        ([{"CPU": 2.0}], 0, 0, (0, 2)),
    ],
)
def test_cluster_is_shared(nodes: list[dict[str, float]], jobs: int, gpus: float, expected: tuple[int, int]) -> None:
    assert share_cluster(nodes, jobs, gpus) == expected


@given(cpus=st.lists(st.integers(0, 32), min_size=1, max_size=6), jobs=st.integers(1, 40))
def test_all_actors_fit_at_once(cpus: list[int], jobs: int) -> None:
    actors, threads = share_cluster([{"CPU": float(count)} for count in cpus], jobs, 0)
    assert 1 <= actors <= jobs
    assert actors == min(jobs, max(1, sum(cpus)))
    assert sum(count // threads for count in cpus) >= actors or sum(cpus) == 0
