"""What is wrong with a request, gathered field by field."""

from typing import Final, NamedTuple

MAX_VIOLATIONS: Final = 32
"""Status details travel in trailing metadata, which gRPC bounds at about 8 KiB."""

MAX_FIELD_CHARS: Final = 96


class Violation(NamedTuple):
    """One bad field."""

    field: str
    """Its path in `GenerateRequest`, such as `sampling.top_p`, also when that is wrapped in a `StreamRequest`."""
    description: str
    """What is wrong with it; quotes no text of the caller's."""


class Violations:
    """All that is wrong with one request; the first `MAX_VIOLATIONS` are kept, the others counted."""

    __slots__ = ("_found", "_surplus")

    def __init__(self) -> None:
        self._found: list[Violation] = []
        self._surplus = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, field: str, description: str) -> None:
        """Note a bad field."""
        if len(self._found) < MAX_VIOLATIONS:
            self._found.append(Violation(field[:MAX_FIELD_CHARS], description))
        else:
            self._surplus += 1

    def names(self, field: str) -> bool:
        """Whether this very field was found bad."""
        return any(violation.field == field for violation in self._found)

    def listed(self) -> tuple[Violation, ...]:
        """The bad fields, in the order found; the last entry counts what did not fit."""
        if not self._surplus:
            return tuple(self._found)
        return (*self._found, Violation("", f"and {self._surplus} more"))
