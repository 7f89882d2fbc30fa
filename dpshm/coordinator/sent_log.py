"""What front-ends had sent a while ago: which bookings a stock engine's report can have seen.

A stock engine reports its queue, and not what it has received. Its report cannot have seen a request that was
still in flight when the report was made, nor one that waited in front of the engine's scheduler. So a booking
counts as received once it is `IN_FLIGHT_NS` old; until then it counts beside what the reports say. That is too
much for a moment, if a report has seen the request already. It is never too little for a request that takes less.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from dpshm.board.outstanding import Words

IN_FLIGHT_NS = 100_000_000
"""More than a request takes to its engine and through a step, and a report back. vLLM's own front-ends count what
they have sent beside the reports for as long: the interval between two of its broadcasts."""
SAMPLE_NS = 10_000_000
"""The shortest time between two samples: a booking may be kept for so much longer."""


class Sample(NamedTuple):
    """What had been sent at a time: requests and tokens, of shape (front-ends, engines)."""

    taken_ns: int
    requests: Words
    tokens: Words


class SentLog:
    """Remembers samples for as long as they are needed."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def look(self, requests: Words, tokens: Words, now_ns: int) -> Sample | None:
        """Takes a sample, and gives the newest one that is `IN_FLIGHT_NS` old; None if there is none yet.

        Args:
            requests: what has been sent, of shape (front-ends, engines).
            tokens: the same.
            now_ns: the time.
        """
        samples = self._samples
        if not samples or now_ns - samples[-1].taken_ns >= SAMPLE_NS:
            samples.append(Sample(now_ns, np.positive(requests), np.positive(tokens)))
        while len(samples) > 1 and samples[1].taken_ns <= now_ns - IN_FLIGHT_NS:
            samples.popleft()
        return samples[0] if samples[0].taken_ns <= now_ns - IN_FLIGHT_NS else None
