"""Which category a captured image has: one for all, its subfolder's name, or by a rule on its path."""

import re
from string import Formatter

from schemas.errors import ConfigError
from schemas.messages import CATEGORY_PATTERN

_GROUP = "category"


class Categories:
    """Finds the category of a file by its path.

    Args:
        category: One for all; with a rule a template, `{part}-{line}`, of the rule's named groups.
        rule: A regular expression, searched for in the path; its group `category` is the category. Without category
            and rule, the first subfolder's name is.

    Raises:
        ConfigError: The rule or the category cannot be used.
    """

    def __init__(self, category: str | None = None, rule: str | None = None) -> None:
        self._rule: re.Pattern[str] | None = None
        self._template = category
        if rule is not None:
            try:
                self._rule = re.compile(rule)
            except re.error as error:
                raise ConfigError(f"the rule {rule!r} is no regular expression: {error}") from None
            self._template = category or f"{{{_GROUP}}}"
            _check_template(self._template, self._rule)
        elif category is not None and not re.fullmatch(CATEGORY_PATTERN, category):
            raise ConfigError(f"{category!r} cannot be a category; it must match {CATEGORY_PATTERN}")

    def of(self, path: str) -> str | None:
        """Return the category of a file, or None where it has none.

        Args:
            path: Relative to the folder, with `/`.
        """
        name: str | None
        if self._rule is not None:
            found = self._rule.search(path)
            name = found and str(self._template).format_map(found.groupdict(""))
        elif self._template is not None:
            name = self._template
        else:
            name = path.partition("/")[0] if "/" in path else None
        return name if name and re.fullmatch(CATEGORY_PATTERN, name) else None


def _check_template(template: str, rule: re.Pattern[str]) -> None:
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ConfigError(f"the template {template!r} of the category cannot be read: {error}") from None
    missing = [field for field in fields if field not in rule.groupindex]
    if missing:
        raise ConfigError(
            f"the rule {rule.pattern!r} has no group named {missing[0]!r}; "
            f"write (?P<{missing[0] or _GROUP}>...) into it"
        )
