"""More than a thousand combinations of values, each checked in all ways: `make test-chart`."""

import itertools
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from helpers.chart import conformity, links
from helpers.chart.combinations import combinations, pairs, values_of
from helpers.chart.rendered import render

LEAST = 1000


def check(combination: dict[str, str]) -> int:
    """Render and check one combination; gives how many documents it has."""
    values = values_of(combination)
    try:
        documents = render(values)
        for document in documents:
            conformity.check(document)
        links.check(documents, values)
    except Exception as error:
        raise AssertionError(f"{combination}: {error}") from error
    return len(documents)


@pytest.mark.sweep
def test_every_combination_is_what_a_cluster_takes(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = list(combinations())
    began_s = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:  # the engine's threads outlive no fork
        counts = list(pool.map(check, chosen, chunksize=24))
    assert len(counts) >= LEAST
    with capsys.disabled():
        took_s = time.monotonic() - began_s
        print(f"\n{len(counts)} combinations, {sum(counts)} documents checked in {took_s:.0f} s")  # noqa: T201 - the figure that is asked for


def test_every_pair_of_choices_is_among_them() -> None:
    met = {frozenset(pair) for one in combinations() for pair in itertools.combinations(one.items(), 2)}
    assert pairs() <= met
