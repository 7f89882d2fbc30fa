"""Shadow mode's account: vLLM's choices beside those that dpshm would have made, and the loads behind both."""

from __future__ import annotations

from collections.abc import Sequence


class ShadowTally:
    """Counts pairs of choices. The loads are those of the board at the moment of the choice.

    Attributes:
        decisions: pairs counted.
        agreed: pairs that named the same rank.
    """

    def __init__(self) -> None:
        self.decisions = 0
        self.agreed = 0
        self._theirs = 0
        self._ours = 0
        self._worst = 0

    def count(self, theirs: int, ours: int, requests: Sequence[int]) -> None:
        """One decision.

        Args:
            theirs: the rank that vLLM chose.
            ours: the rank that dpshm would have chosen.
            requests: by rank, requests waiting, running and on their way.
        """
        self.decisions += 1
        self.agreed += theirs == ours
        self._theirs += requests[theirs]
        self._ours += requests[ours]
        self._worst = max(self._worst, requests[theirs] - requests[ours])

    def summary(self) -> str:
        """One line for the log."""
        n = self.decisions
        if not n:
            return "no decisions yet"
        return (
            f"{n} decisions, {self.agreed} the same ({100 * self.agreed / n:.0f} %). Requests already at the "
            f"chosen engine: vLLM {self._theirs / n:.2f}, dpshm {self._ours / n:.2f} on average; "
            f"vLLM's engine had up to {self._worst} more"
        )
