"""What `dpshm doctor` finds: the thing, why it matters, and the command that mends it."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["error", "warning", "note"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One finding.

    Attributes:
        severity: error: requests fail or wait; warning: they will, or something is blind; note: good to know.
        check: which check found it; stable, for scripts.
        group: whose; null for the node's.
        what: was found.
        why: it matters.
        fix: a command, or what to change.
    """

    severity: Severity
    check: str
    group: str | None = None
    what: str
    why: str
    fix: str
