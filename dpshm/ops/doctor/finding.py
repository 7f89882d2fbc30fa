"""A finding of `dpshm doctor`: the problem, why it matters, and the command that mends it."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["error", "warning", "note"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One finding.

    Attributes:
        severity: "error": requests fail or wait; "warning": they will, or a tool cannot see them; "note": no harm.
        check: the name of the check; stable, for scripts.
        group: the group's name; null for a finding about the node.
        what: the problem.
        why: the reason why it matters.
        fix: a command, or the thing to change.
    """

    severity: Severity
    check: str
    group: str | None = None
    what: str
    why: str
    fix: str


def requests(number: int) -> str:
    """So many requests, in words."""
    return f"{number} request{'s' * (number != 1)}"


def some_of(names: list[str]) -> str:
    """Names as words; of many the first ones."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
