"""Shadow mode: vLLM chooses, and its choices are compared with those that dpshm would have made.

The board is filled as in the other modes: rows, bookings, wave. So the comparison sees the loads that dpshm would
see. Only the choice, the wake-ups and the wave of a client stay vLLM's.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from typing import Any

from dpshm.errors import NoEngineAvailable
from dpshm.vllm.booking_link import BookingLink
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options


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
        self._their_cached = 0
        self._our_cached = 0

    def count(self, theirs: int, ours: int, requests: Sequence[int], cached: Sequence[int] = ()) -> None:
        """One decision.

        Args:
            theirs: the rank that vLLM chose.
            ours: the rank that dpshm would have chosen.
            requests: by rank, requests waiting, running and in flight.
            cached: by rank, tokens of the prompt that it has cached; empty if that is not known.
        """
        self.decisions += 1
        self.agreed += theirs == ours
        self._theirs += requests[theirs]
        self._ours += requests[ours]
        self._worst = max(self._worst, requests[theirs] - requests[ours])
        if cached:
            self._their_cached += cached[theirs]
            self._our_cached += cached[ours]

    def summary(self) -> str:
        """One line for the log."""
        n = self.decisions
        if not n:
            return "no decisions yet"
        cached = ""
        if self._their_cached or self._our_cached:
            cached = (
                f". Prompt tokens cached there: vLLM {self._their_cached}, dpshm {self._our_cached}; "
                f"vLLM's choices gave {self._our_cached - self._their_cached} away"
            )
        return (
            f"{n} decisions, {self.agreed} the same ({100 * self.agreed / n:.0f} %). Requests already at the "
            f"chosen engine: vLLM {self._theirs / n:.2f}, dpshm {self._ours / n:.2f} on average; "
            f"vLLM's engine had up to {self._worst} more{cached}"
        )


class ShadowLink(BookingLink):
    """A client that leaves the choice to vLLM, and counts how often dpshm's choice would have differed."""

    does = "leaves the choice to vLLM and compares (shadow)"
    instead_of_broadcast = False

    def __init__(self, client: Any, group: str, options: Options) -> None:
        super().__init__(client, group, options)
        self._tally = ShadowTally()
        self._log_s = options.shadow_log_s
        self._next_log = time.monotonic() + self._log_s
        atexit.register(self._log)

    def _choose(self, stock: Callable[[Any], Any], request: Any) -> Any:
        ours: int | None = None
        requests: list[int] = []
        cached: list[int] = []
        try:
            if not self._is_pinned(request):
                prompt = self._prompt(request)
                ours = self._frontend.choose(self._tokens(request), prompt=prompt, key=self._key(request))
                cached = [] if prompt is None else self._frontend.cached(prompt)
            requests = self._frontend.snapshot()["requests"].tolist()
        except NoEngineAvailable:
            ours = None
        except Exception:
            self._give_up()
            return stock(request)
        engine = stock(request)
        try:
            route = self._book(request, engine)
            if ours is not None and route is not None:
                self._tally.count(route.dp_rank, ours, requests, cached)
            if time.monotonic() >= self._next_log:
                self._log()
        except Exception:
            self._give_up()
        return engine

    def _log(self) -> None:
        self._next_log = time.monotonic() + self._log_s
        if self._tally.decisions:
            logger.info("dpshm shadow, API server %d: %s", self._client.client_index, self._tally.summary())
