"""A logger for what a hostile or broken peer could repeat without end: counted always, logged rarely."""

from __future__ import annotations

import logging
import time
from collections import Counter


class LimitedLog:
    """Counts occurrences by reason and logs the first of each, then at most one line an interval.

    Attributes:
        counts: occurrences by reason, since the start.
    """

    def __init__(self, logger: logging.Logger, interval_s: float = 5.0) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._next_at: dict[str, float] = {}
        self._silent: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def warn(self, reason: str, detail: object) -> None:
        """Notes one occurrence; `reason` is one of a few fixed words."""
        self.counts[reason] += 1
        now = time.monotonic()
        if now < self._next_at.get(reason, 0.0):
            self._silent[reason] += 1
            return
        self._next_at[reason] = now + self._interval_s
        more = self._silent.pop(reason, 0)
        self._logger.warning("%s: %s%s", reason, detail, f" (and {more} more like it)" if more else "")
