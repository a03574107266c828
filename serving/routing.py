"""Which detector replica judges which category, and which replica takes a call: the policy alone, without Ray.

Where all categories fit into a replica's memory, any replica can take a call, and one on the caller's node is
preferred. Where they do not, each category has an order of the replicas by rendezvous hashing: every caller computes
the same one, and a replica that comes or goes changes the first replica of its own categories only.

A replica that has more calls than its share of them is passed over (consistent hashing with bounded loads, Mirrokni et
al., arXiv 1608.01350), so that one category that everybody pushes is judged by several replicas.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

CATEGORIES_FIT = "categories_fit"
"""Name of what each replica reports for routing: whether all categories fit into its memory."""

MOST_OF_MEAN = 1.25
"""A replica takes a call as long as it has at most this many times the mean of all replicas."""
MOST_OF_MEAN_WITH_MODELS = 4.0
"""The same where categories do not fit: whichever replica takes a call in its place must load its models first."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What a process knows of a deployment's replicas.

    Attributes:
        replicas: Their ids.
        categories_fit: Whether all categories fit into each one's memory.
    """

    replicas: frozenset[str] = frozenset()
    categories_fit: bool = True


_placements: dict[str, Placement] = {}


def set_placement(deployment: str, placement: Placement) -> None:
    """Take note of a deployment's replicas; the request router does, in its own thread."""
    _placements[deployment] = placement


def placement_of(deployment: str) -> Placement:
    """Return what this process knows of a deployment's replicas."""
    return _placements.get(deployment, Placement())


def replicas_of(category: str, replicas: Collection[str]) -> tuple[str, ...]:
    """Return the replicas in the order in which they are to judge a category.

    Args:
        category: The category's name.
        replicas: Ids of the replicas, in any order.
    """
    return _ranked(category, tuple(sorted(replicas)))


def split(categories: Sequence[str], placement: Placement) -> list[list[int]]:
    """Divide a batch into calls, one for each replica that is first for some of its categories.

    Args:
        categories: Each image's category.
        placement: The replicas; the batch stays whole where the categories fit into each of them, and with one or none.

    Returns:
        For each call the rows of its images, ascending; together every row once.
    """
    replicas = placement.replicas
    if placement.categories_fit or len(replicas) < 2:  # noqa: PLR2004 - there is nothing to choose
        return [list(range(len(categories)))]
    rows_of: dict[str, list[int]] = {}
    for row, category in enumerate(categories):
        rows_of.setdefault(replicas_of(category, replicas)[0], []).append(row)
    return list(rows_of.values())


def choose(ranking: Iterable[str], calls: Mapping[str, int], most_of_mean: float = MOST_OF_MEAN) -> list[str]:
    """Return the replicas in the order in which a call is to be tried.

    Args:
        ranking: Ids of the replicas, the preferred one first.
        calls: Calls that each has under way, as far as known.
        most_of_mean: Share of the mean up to which a replica is not passed over.

    Returns:
        The same replicas; those that have their share of the calls already come last.
    """
    order = list(ranking)
    if not order:
        return []
    most = math.ceil(most_of_mean * (sum(calls.get(one, 0) for one in order) + 1) / len(order))
    return sorted(order, key=lambda one: calls.get(one, 0) >= most)  # stable: the ranking is kept within each part


@lru_cache(maxsize=16_384)
def _ranked(category: str, replicas: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(replicas, key=lambda one: blake2b(f"{one}/{category}".encode(), digest_size=8).digest()))
