"""What stock front-ends hear: counts of all ranks at an interval, or, without an interval, changes of the wave.

Counts are published when they changed, at most once an interval, and unchanged ones at a longer interval. Nothing
is published while no front-end is subscribed: dpshm's own front-ends read the board.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpshm.coordinator.settings import Settings
from dpshm.coordinator.sockets import Sockets
from dpshm.coordinator.step_counts import RankCounts
from dpshm.coordinator.stock_peers import StockEngines
from dpshm.net import wire
from dpshm.rules.waves import CoordinatorState, Phase

if TYPE_CHECKING:
    from dpshm.coordinator.row import CoordinatorRow

_MS = 1_000_000


class Publisher:
    """Publishes to stock front-ends. Used in the wave thread alone.

    Attributes:
        listeners: how many front-ends are subscribed.
    """

    def __init__(self, settings: Settings, sockets: Sockets, row: CoordinatorRow, stock: StockEngines) -> None:
        self._interval_ns = settings.interval_ms * _MS
        self._refresh_ns = settings.idle_refresh_ms * _MS
        self._with_kv = settings.counts_with_kv
        self._sockets = sockets
        self._row = row
        self._stock = stock
        self._published: list[RankCounts] = []
        self._next_counts_ns = 0
        self._next_refresh_ns = 0
        self.listeners = 0

    def on_join(self, now_ns: int, state: CoordinatorState) -> None:
        """A front-end subscribed: it hears at once what there is."""
        self.listeners += 1
        if self._interval_ns:
            self.publish_counts(now_ns, state, self._stock.counts())
        else:
            self.publish_state(state)

    def on_leave(self) -> None:
        """A front-end unsubscribed."""
        self.listeners = max(0, self.listeners - 1)

    def on_disconnect(self) -> None:
        """Every connection was ended; front-ends that live subscribe again."""
        self.listeners = 0

    def on_time(self, now_ns: int, state: CoordinatorState) -> None:
        """Publishes the counts if that is due."""
        if self.due_ns is None or now_ns < self.due_ns:
            return
        self._next_counts_ns = now_ns + self._interval_ns
        counts = self._stock.counts()
        if now_ns >= self._next_refresh_ns or counts != self._published:
            self.publish_counts(now_ns, state, counts)

    @property
    def due_ns(self) -> int | None:
        """When `on_time` has something to do; None: never."""
        return self._next_counts_ns if self.listeners and self._interval_ns else None

    def publish_state(self, state: CoordinatorState) -> None:
        """Publishes wave and phase alone."""
        self._row.count("states_published")
        self._sockets.frontends.send(wire.encode_state(None, state.wave, state.phase is Phase.RUNNING))

    def publish_counts(self, now_ns: int, state: CoordinatorState, counts: list[RankCounts]) -> None:
        """Publishes counts by rank, with wave and phase."""
        self._published = counts
        self._next_refresh_ns = now_ns + self._refresh_ns
        self._row.count("counts_published")
        sent = counts if self._with_kv else [c[:2] for c in counts]
        self._sockets.frontends.send(wire.encode_state(sent, state.wave, state.phase is Phase.RUNNING))
