"""Counts for stock peers: what vLLM's own front-ends are told about the queues, and when.

Lockstep engines report step by step. While the reports of a step come in, their counts are a mixture of two
steps, and a mixture makes ranks look uneven that are not. So the first report of a newer (wave, step) keeps
the counts as they were when the step before it was complete, and those are published next.
"""

from __future__ import annotations

from typing import TypeAlias

RankCounts: TypeAlias = tuple[int, int, float]  # waiting, running, KV-cache usage


class StepCounts:
    """Newest counts by rank, and those of the last complete step."""

    def __init__(self) -> None:
        self._current: dict[int, RankCounts] = {}
        self._complete: dict[int, RankCounts] | None = None
        self._newest = (0, 0)

    def report(self, dp_rank: int, wave: int, step: int, counts: RankCounts) -> bool:
        """Takes a report in; false if its (wave, step) is older than one already seen."""
        at = (wave, step)
        if at > self._newest:
            self._complete = dict(self._current) or None
            self._newest = at
        self._current[dp_rank] = counts
        return at >= self._newest

    def take(self) -> dict[int, RankCounts]:
        """The counts to publish: of the last complete step if a newer one has begun, else the newest."""
        counts = dict(self._current) if self._complete is None else self._complete
        self._complete = None
        return counts

    def keep_only(self, dp_size: int) -> None:
        """Forgets ranks that no longer exist."""
        for counts in (self._current, self._complete or {}):
            for dp_rank in [r for r in counts if r >= dp_size]:
                del counts[dp_rank]
