"""The prefill backlog of an engine: prompt tokens that it has received and not yet computed.

The scheduler of vLLM keeps no such sum. A request is followed from its arrival until its prompt is computed or it
ends. Only requests in the batch change from step to step. So an update goes through the batch, or through all that
are followed where those are fewer, and never through a long queue. Followed requests outside the batch must be
exactly those that wait. When the numbers differ (a request was aborted in the queue, or preempted and begins
anew), the update goes through all requests once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol


class PromptedRequest(Protocol):
    """What is used of vLLM's ``Request``."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    status: object

    def is_finished(self) -> bool:
        """Whether the request finished or was aborted."""


class _Followed:
    """A request whose prompt is not computed.

    Attributes:
        request: the request.
        expected: prompt tokens that its front-end expects to be cached.
        left: prompt tokens that were to be computed at the last update.
    """

    __slots__ = ("expected", "left", "prefill_stats", "request")

    def __init__(self, request: PromptedRequest, expected: int) -> None:
        self.request = request
        self.expected = expected
        self.left = self.count()
        # Kept from the start: the scheduler fills it in, and removes it from the request at the first token.
        self.prefill_stats: Any = getattr(request, "prefill_stats", None)

    def count(self) -> int:
        """Prompt tokens that are to be computed; while it waits, without those expected to be cached."""
        request = self.request
        return max(0, request.num_prompt_tokens - (request.num_computed_tokens or self.expected))


class PrefillBacklog:
    """Follows the requests of one scheduler whose prompts are not computed.

    Attributes:
        tokens: the backlog at the last update.
        cached: prompt tokens of all requests so far that were found in the engine's own cache.
    """

    def __init__(self, running: object) -> None:
        """Follows none.

        Args:
            running: the `status` of a request that is in the batch.
        """
        self._running = running
        self._followed: dict[str, _Followed] = {}
        self._batch = self._in_batch = 0  # of the last update: requests in the batch, and those of them followed
        self.tokens = 0
        self.cached = 0

    def add(self, request: PromptedRequest, expected: int = 0) -> None:
        """Follows a request that came into the queue.

        Args:
            request: the request.
            expected: prompt tokens that its front-end did not book, because it expects them to be cached.
        """
        known = _Followed(request, expected)
        if known.left > 0 and not request.is_finished():
            self._followed[request.request_id] = known
            self.tokens += known.left

    def is_current(self, num_running: int, num_waiting: int) -> bool:
        """Whether nothing but requests that `add` was told of has changed since the last update, and no step.

        Between two steps no request enters the batch. One that leaves it, or the queue, changes a number.

        Args:
            num_running: the number of requests that are running.
            num_waiting: the number of requests that wait.
        """
        return num_running == self._batch and num_waiting == len(self._followed) - self._in_batch

    def update(
        self, batch: Collection[PromptedRequest], num_waiting: int, everything: Iterable[PromptedRequest]
    ) -> int:
        """Brings `tokens` up to date with the scheduler.

        Args:
            batch: the requests that are running.
            num_waiting: the number of requests that wait.
            everything: all unfinished requests.

        Returns:
            Prompt tokens computed since the last update; those found in a cache do not count.
        """
        followed = self._followed
        self._batch, self._in_batch = len(batch), 0
        if not followed and not num_waiting:
            return 0
        computed = in_batch = 0
        if len(followed) > len(batch):
            running = [followed[request.request_id] for request in batch if request.request_id in followed]
        else:
            running = [known for known in followed.values() if known.request.status == self._running]
        for known in running:
            computed += self._update_request(known)
            in_batch += known.request.request_id in followed
        if len(followed) - in_batch != num_waiting:
            for known in list(followed.values()):
                computed += self._update_request(known)
            for request in everything:
                if request.request_id not in followed:
                    self.add(request)
        self._in_batch = in_batch
        return computed

    def _update_request(self, known: _Followed) -> int:
        """Prompt tokens of one request that were computed since its last update."""
        request, before = known.request, known.left
        left, computed = known.count(), 0
        if left != before:
            computed = max(0, before - left - self._surprise(known))
        known.left = left
        self.tokens += left - before
        if not left or request.is_finished():
            self.tokens -= left
            del self._followed[request.request_id]
        return computed

    def _surprise(self, known: _Followed) -> int:
        """How many tokens more than expected were found in a cache; counts them, once a request."""
        stats, known.prefill_stats = known.prefill_stats, None
        if stats is None:
            return 0
        found = stats.num_cached_tokens
        self.cached += getattr(stats, "num_local_cached_tokens", found)
        return int(found) - known.expected
