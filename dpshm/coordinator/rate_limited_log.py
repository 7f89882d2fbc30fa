"""Counts what a hostile or broken peer can repeat without end, and logs a few lines of it."""

from __future__ import annotations

import logging
import time
from collections import Counter


class RateLimitedLog:
    """Counts occurrences by reason, and logs each reason at most so many times an interval.

    Args:
        logger: where the lines go.
        interval_s: the interval's length.
        lines: how many lines of each reason an interval may have.
        level: the lines' level.

    Attributes:
        counts: occurrences by reason, since the start.
    """

    def __init__(
        self, logger: logging.Logger, interval_s: float = 5.0, *, lines: int = 1, level: int = logging.WARNING
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._lines = lines
        self._level = level
        self._next_at: dict[str, float] = {}
        self._said: Counter[str] = Counter()
        self._silent: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def note(self, reason: str, detail: object) -> None:
        """Counts one occurrence, and logs it or not; `reason` is one of a few fixed words."""
        self.counts[reason] += 1
        now = time.monotonic()
        if now >= self._next_at.get(reason, 0.0):
            self._next_at[reason] = now + self._interval_s
            self._said[reason] = 0
        if self._said[reason] >= self._lines:
            self._silent[reason] += 1
            return
        self._said[reason] += 1
        more = self._silent.pop(reason, 0)
        tail = f" (and {more} more like it)" if more else ""
        self._logger.log(self._level, "%s: %s%s", reason, detail, tail)
