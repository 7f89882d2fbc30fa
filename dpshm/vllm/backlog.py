"""The prefill backlog of an engine: prompt tokens that it has taken in and not computed, from its own requests.

The scheduler of vLLM keeps no such sum. Requests are followed from their arrival until their prompt is computed
or they are gone. Only those in the batch change from step to step, so a look goes through the batch and not
through the queue. Who is followed and not in the batch must be waiting, and the other way round: when the numbers
differ (one was aborted in the queue, or preempted and has to begin anew) everything is looked through once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol


class PromptedRequest(Protocol):
    """What is used of vLLM's ``Request``."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int

    def is_finished(self) -> bool:
        """Whether it ended, in whatever way."""


class _Followed:
    """A request whose prompt is not computed, and what was left of it at the last look."""

    __slots__ = ("left", "prefill_stats", "request")

    def __init__(self, request: PromptedRequest, left: int) -> None:
        self.request = request
        self.left = left
        # Kept from the beginning: the scheduler fills it in and the first token takes it off the request.
        self.prefill_stats: Any = getattr(request, "prefill_stats", None)

    def cached(self) -> int:
        """Tokens of its prompt found in a cache, told once, when it was first scheduled."""
        stats, self.prefill_stats = self.prefill_stats, None
        return getattr(stats, "num_cached_tokens", 0)


class PrefillBacklog:
    """Follows the requests of one scheduler whose prompts are not computed.

    Attributes:
        tokens: the backlog at the last look.
    """

    def __init__(self) -> None:
        self._followed: dict[str, _Followed] = {}
        self.tokens = 0

    def add(self, request: PromptedRequest) -> None:
        """A request came into the queue."""
        left = request.num_prompt_tokens - request.num_computed_tokens
        if left > 0 and not request.is_finished():
            self._followed[request.request_id] = _Followed(request, left)
            self.tokens += left

    def look(
        self, batch: Collection[PromptedRequest], num_waiting: int, everything: Iterable[PromptedRequest]
    ) -> int:
        """Brings `tokens` up to date.

        Args:
            batch: the requests that the scheduler runs.
            num_waiting: how many wait.
            everything: all unfinished requests.

        Returns:
            Prompt tokens computed since the last look; those found in a cache do not count.
        """
        followed = self._followed
        if not followed and not num_waiting:
            return 0
        computed = in_batch = 0
        for request in batch:
            known = followed.get(request.request_id)
            if known is not None:
                computed += self._look_at(known)
                if request.request_id in followed:
                    in_batch += 1
        if len(followed) - in_batch != num_waiting:
            for known in list(followed.values()):
                computed += self._look_at(known)
            for request in everything:
                if request.request_id not in followed:
                    self.add(request)
        return computed

    def _look_at(self, known: _Followed) -> int:
        """Prompt tokens of one request that were computed since the last look at it."""
        request, before = known.request, known.left
        left = max(0, request.num_prompt_tokens - request.num_computed_tokens)
        computed = max(0, before - left - known.cached()) if left != before else 0
        known.left = left
        self.tokens += left - before
        if not left or request.is_finished():
            self.tokens -= left
            del self._followed[request.request_id]
        return computed
