"""The category of a captured file."""

import pytest

from schemas.errors import ConfigError
from workers.capture.categories import Categories


@pytest.mark.parametrize(
    ("categories", "path", "category"),
    [
        (Categories(), "bottle/2026/a.png", "bottle"),
        (Categories(), "a.png", None),
        (Categories(), "line 7/a.png", None),
        (Categories(), "bottle\n/a.png", None),
        (Categories("bottle"), "any/a.png", "bottle"),
        (Categories(rule=r"(?P<category>\w+)_\d+\.png$"), "x/cap_0042.png", "cap"),
        (Categories(rule=r"(?P<category>\w+)_\d+\.png$"), "x/0042.png", None),
        (Categories("{part}-{line}", r"^(?P<line>L\d)/(?P<part>[a-z]+)"), "L7/cap_1.png", "cap-L7"),
        (Categories("bottle", r"^L7/"), "L7/a.png", "bottle"),
        (Categories("bottle", r"^L7/"), "L8/a.png", None),
        (Categories(rule=r"(?P<category>x)?a"), "a.png", None),
    ],
)
def test_category_by_path(categories: Categories, path: str, category: str | None) -> None:
    assert categories.of(path) == category


@pytest.mark.parametrize(
    ("category", "rule", "error"),
    [
        ("../x", None, "cannot be a category"),
        ("{part}", None, "cannot be a category"),
        (None, "(", "is no regular expression"),
        (None, "[0-9]+", "has no group named 'category'"),
        ("{part.__class__}", "(?P<part>x)", "has no group named"),
        ("{part", "(?P<part>x)", "cannot be read"),
    ],
)
def test_what_gives_no_category_is_refused_at_the_start(category: str | None, rule: str | None, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        Categories(category, rule)
