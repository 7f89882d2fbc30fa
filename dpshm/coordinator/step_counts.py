"""The queues that stock engines reported, of one step at a time.

Lockstep engines report step by step. While the reports of a step come in, the newest counts of all ranks are a
mixture of two steps, and even ranks look uneven in it. So the first report of a newer (wave, step) keeps the
counts of the step before, which is complete then, and those are published next.
"""

from __future__ import annotations

from typing import TypeAlias

RankCounts: TypeAlias = tuple[int, int, float]  # waiting, running, KV-cache usage


class StepCounts:
    """The newest counts by rank, and those of the last complete step until they are published."""

    def __init__(self) -> None:
        self._current: dict[int, RankCounts] = {}
        self._complete: dict[int, RankCounts] | None = None
        self._newest = (0, 0)

    def report(self, dp_rank: int, wave: int, step: int, counts: RankCounts) -> bool:
        """Notes a report; false if its (wave, step) is older than one already seen."""
        at = (wave, step)
        if at > self._newest:
            self._complete = dict(self._current) or None
            self._newest = at
        self._current[dp_rank] = counts
        return at >= self._newest

    def next_to_publish(self) -> dict[int, RankCounts]:
        """The counts of the last complete step if a newer one has begun, once; then the newest."""
        counts = dict(self._current) if self._complete is None else self._complete
        self._complete = None
        return counts

    def keep_only(self, dp_size: int) -> None:
        """Forgets the ranks from `dp_size` on, which no longer exist."""
        for counts in (self._current, self._complete or {}):
            for dp_rank in [r for r in counts if r >= dp_size]:
                del counts[dp_rank]
