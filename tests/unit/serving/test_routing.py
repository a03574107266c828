"""Which replica a category goes to, and which takes a call; no Ray."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serving.routing import MOST_OF_MEAN_WITH_MODELS, Placement, choose, replicas_of, split

replica_names = st.sets(st.text("abcdef0123456789", min_size=4, max_size=8), min_size=1, max_size=12)
categories = st.lists(st.text(min_size=1, max_size=8), max_size=32)


@given(st.text(), replica_names)
def test_every_caller_computes_the_same_order(category: str, replicas: set[str]) -> None:
    order = replicas_of(category, sorted(replicas))
    assert order == replicas_of(category, sorted(replicas, reverse=True))
    assert sorted(order) == sorted(replicas)


@given(st.text(), replica_names, st.text("xyz", min_size=4, max_size=8))
def test_replica_that_comes_or_goes_changes_only_its_own_categories(
    category: str, replicas: set[str], other: str
) -> None:
    before, after = replicas_of(category, replicas), replicas_of(category, replicas | {other})
    assert tuple(one for one in after if one != other) == before


def test_categories_are_spread_evenly() -> None:
    first = Counter(replicas_of(f"part-{number:03}", {"a", "b", "c", "d"})[0] for number in range(400))
    assert min(first.values()) > 70


@given(categories, replica_names)
def test_split_has_every_row_once_and_keeps_a_category_together(names: list[str], replicas: set[str]) -> None:
    calls = split(names, Placement(frozenset(replicas), categories_fit=False))
    assert sorted(row for rows in calls for row in rows) == list(range(len(names)))
    assert len(calls) <= max(1, len(replicas))
    for category in set(names):
        assert sum(any(names[row] == category for row in rows) for rows in calls) == 1


def test_batch_stays_whole_where_there_is_nothing_to_choose() -> None:
    for placement in (Placement(), Placement(frozenset({"one"}), categories_fit=False), Placement(frozenset("xyz"))):
        assert split(["a", "b", "a"], placement) == [[0, 1, 2]]


@given(replica_names, st.dictionaries(st.text(), st.integers(0, 50)))
def test_choice_has_every_replica_once(replicas: set[str], calls: dict[str, int]) -> None:
    assert sorted(choose(sorted(replicas), calls)) == sorted(replicas)


def test_first_replica_is_kept_until_it_has_more_than_its_share_of_the_calls() -> None:
    assert choose(["a", "b"], {}) == ["a", "b"]
    assert choose(["a", "b"], {"a": 2, "b": 2}) == ["a", "b"]
    assert choose(["a", "b"], {"a": 3, "b": 1}) == ["a", "b"]
    assert choose(["a", "b"], {"a": 4}) == ["b", "a"]
    assert choose(["a", "b", "c"], {"a": 4}, MOST_OF_MEAN_WITH_MODELS) == ["a", "b", "c"]
    assert choose(["a", *"bcdefgh"], {"a": 4}, MOST_OF_MEAN_WITH_MODELS)[-1] == "a"
    assert choose(["a"], {"a": 100}) == ["a"]
    assert choose([], {}) == []


@given(st.integers(2, 8), st.integers(1, 200))
def test_no_replica_gets_much_more_than_its_share_even_if_all_calls_prefer_it(replicas: int, total: int) -> None:
    names = [f"replica-{number}" for number in range(replicas)]
    calls: Counter[str] = Counter()
    for _ in range(total):
        calls[choose(names, calls)[0]] += 1
    assert max(calls.values()) <= 1.25 * total / replicas + 1
