"""When all ranks of a group are there: a table of what happened, and nothing else.

The group is complete when there is a connection for each rank (`dpshm.coordinator.connections`):

- at once, if every rank's row is held;
- else, if no connection came or went for `RECOUNT_NS`: an engine that restarts may have two for a moment, and the
  connections of stock engines have no names. If rows are missing then, it is counted again each `RECOUNT_NS`: an
  engine on another node sends its row over a connection of its own, which may be later.

A group that was complete once stays ready. READY is sent to all then, and again whenever an engine joins: engines
that know it already skip it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

from dpshm.coordinator.connections import Connections

RECOUNT_NS = 100_000_000


class ReadinessEvent(Enum):
    """What follows from a join, or from time."""

    ENGINE_RETURNED = auto()
    """An engine joined a ready group: READY is to be sent again."""
    BECAME_READY = auto()
    """For the first time all are connected."""
    TIMED_OUT = auto()
    """The group was not ready in time; it may still become so."""


class Readiness:
    """Says when a group is complete. Times are of one monotonic clock.

    Args:
        now_ns: the time.
        timeout_ns: after which the group is late; 0: never.
        connections: the engines'.
        held: by rank, whether a process holds its row. Asked only where it matters, as each costs a system call.
        ready: it was complete already, under an earlier coordinator.

    Attributes:
        ready: whether all ranks were there at some time.
    """

    def __init__(
        self,
        now_ns: int,
        timeout_ns: int,
        connections: Connections,
        held: Callable[[], Sequence[bool]],
        *,
        ready: bool,
    ) -> None:
        self.ready = ready
        self._connections = connections
        self._held = held
        self._recount_at_ns: int | None = None
        self._deadline_ns = now_ns + timeout_ns if timeout_ns and not ready else None

    def on_join(self, now_ns: int, dp_size: int) -> list[ReadinessEvent]:
        """An engine subscribed."""
        if self.ready:
            return [ReadinessEvent.ENGINE_RETURNED]
        self._recount_at_ns = now_ns + RECOUNT_NS
        if self._connections.count < dp_size or not all(held := self._held()):
            return []
        return self._recount(held)

    def on_change(self, now_ns: int) -> None:
        """A connection ended, or the number of ranks changed."""
        if not self.ready:
            self._recount_at_ns = now_ns + RECOUNT_NS

    def on_time(self, now_ns: int, dp_size: int) -> list[ReadinessEvent]:
        """Time has passed."""
        events: list[ReadinessEvent] = []
        if self._recount_at_ns is not None and now_ns >= self._recount_at_ns:
            self._recount_at_ns = None
            if self._connections.count >= dp_size:
                events += self._recount(self._held())
                if not self.ready:
                    self._recount_at_ns = now_ns + RECOUNT_NS
        if self._deadline_ns is not None and now_ns >= self._deadline_ns:
            self._deadline_ns = None
            if not self.ready:
                events.append(ReadinessEvent.TIMED_OUT)
        return events

    @property
    def settled(self) -> bool:
        """Whether no recount is due."""
        return self._recount_at_ns is None

    def set_ready(self) -> None:
        """All are there, as the head of a follower says."""
        self.ready = True
        self._recount_at_ns = None

    def _recount(self, held: Sequence[bool]) -> list[ReadinessEvent]:
        if self.ready or self._connections.ranks(held) < len(held):
            return []
        self.set_ready()
        return [ReadinessEvent.BECAME_READY]
