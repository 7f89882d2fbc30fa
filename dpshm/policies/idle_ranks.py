"""Which ranks have made no step for so long that what they learnt of their steps may be out of date.

A rank that was slow gets few requests, at low load none. It makes no steps then, so it never learns that it has
recovered, and it would get none for ever. Decisions therefore take a rank without a step for `IDLE_NS` to be like
the others. It gets a request or two, its step model follows within some tens of steps, and its own word counts
again from its first step.
"""

from __future__ import annotations

from collections.abc import Sequence

IDLE_NS = 5_000_000_000
"""A rank that really is slow is tried that often: a request or two in 5 s."""


class IdleRanks:
    """Remembers when each rank was first seen with its number of steps. The caller gives the time."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._since_ns: list[int] = []

    def look(self, steps: Sequence[int], now_ns: int) -> list[bool]:
        """By rank, whether it has been idle for `IDLE_NS`.

        Args:
            steps: by rank, how many it has made.
            now_ns: CLOCK_MONOTONIC.
        """
        known = self._steps
        if len(steps) != len(known):
            self._since_ns = [*self._since_ns[: len(steps)], *[now_ns] * (len(steps) - len(known))]
            known = [*known[: len(steps)], *steps[len(known) :]]
        self._since_ns = [
            since if before == count else now_ns
            for since, before, count in zip(self._since_ns, known, steps, strict=True)
        ]
        self._steps = list(steps)
        return [now_ns - since >= IDLE_NS for since in self._since_ns]
