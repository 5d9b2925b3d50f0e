"""Patterns that choose layers by their names, in every function that takes them."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


#: one pattern, or several
Patterns = str | Iterable[str]


class NameFilter:
    """Chooses names by patterns.

    Args:
        include: one pattern as of `fnmatch`, or several; names that match none are not chosen.
        exclude: likewise; names that match one are not chosen.

    Raises:
        TypeError: if a pattern is not a string.
    """

    def __init__(self, include: Patterns = "*", exclude: Patterns = ()):
        self.include, self.exclude = as_patterns(include), as_patterns(exclude)

    def reason_to_skip(self, name: str) -> str | None:
        """Why a name is not chosen; None if it is."""
        if not any(fnmatchcase(name, pattern) for pattern in self.include):
            return "not included"
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return "excluded"
        return None


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Patterns as a tuple; a text is one pattern, not one for each of its letters.

    Raises:
        TypeError: if a pattern is not a string.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"A pattern must be a string such as 'encoder.*', got {pattern!r}.")
    return patterns
