"""When all ranks of a group are there: a table of what happened, and nothing else.

Engines subscribe to the coordinator's messages when they come up. A subscription does not say whose it is, and an
engine that restarts may have two for a moment. So the group is complete

- at once, if there are enough subscriptions and every rank's row is held;
- else, if there are enough subscriptions and none came or went for `RECOUNT_NS`: the ranks whose rows were never
  taken are stock engines.

A group that was complete once stays ready. READY is sent to all then, and again whenever an engine joins: engines
that know it already skip it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

RECOUNT_NS = 100_000_000


class ReadinessEvent(Enum):
    """What follows from a join, a leave, or from time."""

    ENGINE_RETURNED = auto()
    """An engine joined a ready group: READY is to be sent again."""
    ALL_CONNECTED = auto()
    """Each rank has a subscription: those that never took a row are stock engines."""
    BECAME_READY = auto()
    """For the first time all are connected."""
    TIMED_OUT = auto()
    """The group was not ready in time; it may still become so."""


class Readiness:
    """Counts subscriptions. Times are of one monotonic clock.

    Args:
        now_ns: the time.
        timeout_ns: after which the group is late; 0: never.
        ready: it was complete already, under an earlier coordinator.

    Attributes:
        subscribed: engines that are subscribed.
        ready: whether all ranks were there at some time.
    """

    def __init__(self, now_ns: int, timeout_ns: int, *, ready: bool) -> None:
        self.subscribed = 0
        self.ready = ready
        self._recount_at_ns: int | None = None
        self._deadline_ns = now_ns + timeout_ns if timeout_ns and not ready else None

    def on_join(self, now_ns: int, dp_size: int, every_row_is_held: Callable[[], bool]) -> list[ReadinessEvent]:
        """An engine subscribed; the rows are asked for only where it matters, as each costs a system call."""
        self.subscribed += 1
        self._recount_at_ns = now_ns + RECOUNT_NS
        if self.ready:
            return [ReadinessEvent.ENGINE_RETURNED]
        return self._all_connected() if self.subscribed >= dp_size and every_row_is_held() else []

    def on_leave(self, now_ns: int) -> None:
        """An engine unsubscribed."""
        self.subscribed = max(0, self.subscribed - 1)
        self._recount_at_ns = now_ns + RECOUNT_NS

    def on_resize(self, now_ns: int) -> None:
        """The number of ranks changed."""
        self._recount_at_ns = now_ns + RECOUNT_NS

    def on_disconnect(self) -> None:
        """Every connection was ended; engines that live subscribe again."""
        self.subscribed = 0

    def on_time(self, now_ns: int, dp_size: int) -> list[ReadinessEvent]:
        """Time has passed."""
        events: list[ReadinessEvent] = []
        if self._recount_at_ns is not None and now_ns >= self._recount_at_ns:
            self._recount_at_ns = None
            if self.subscribed >= dp_size:
                events += self._all_connected()
        if self._deadline_ns is not None and now_ns >= self._deadline_ns:
            self._deadline_ns = None
            if not self.ready:
                events.append(ReadinessEvent.TIMED_OUT)
        return events

    @property
    def settled(self) -> bool:
        """Whether no recount is due."""
        return self._recount_at_ns is None

    def _all_connected(self) -> list[ReadinessEvent]:
        if self.ready:
            return [ReadinessEvent.ALL_CONNECTED]
        self.ready = True
        return [ReadinessEvent.ALL_CONNECTED, ReadinessEvent.BECAME_READY]
