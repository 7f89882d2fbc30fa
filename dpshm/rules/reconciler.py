"""What the rows of the board say about the waves, also when messages were lost.

The wave thread gives `WaveReconciler.events` what it read and the time, and gives the events that come back to
`dpshm.rules.waves.handle_coordinator`. The reconciler remembers one thing: how long the rows have said the same.

Only rows of dpshm's own engines count. A stock engine's row shows its queue, not whether it steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dpshm.rules.waves import (
    CoordinatorEvent,
    CoordinatorState,
    Phase,
    RanksIdle,
    RanksSplit,
    SeenRunning,
    WakeTimer,
)


class RowState(NamedTuple):
    """What one live engine's state word says."""

    dp_rank: int
    wave: int
    running: bool


class Lasting:
    """Tells when a condition has held without a break for an interval.

    Args:
        interval_ns: how long it has to hold.
    """

    def __init__(self, interval_ns: int) -> None:
        self._interval_ns = interval_ns
        self._since_ns: int | None = None

    def holds(self, now_ns: int, condition: bool) -> bool:
        """Whether the condition holds now and has held for the interval; the next interval then begins."""
        if not condition:
            self._since_ns = None
        elif self._since_ns is None:
            self._since_ns = now_ns
        elif now_ns - self._since_ns >= self._interval_ns:
            self._since_ns = now_ns
            return True
        return False

    def restart(self) -> None:
        """Forgets since when the condition holds."""
        self._since_ns = None


class WaveReconciler:
    """Turns what rows show, and for how long, into events; and keeps the timer of a wake-up.

    Args:
        resend_interval_ns: how long a disagreement, an idle group or an unanswered START may last.
        wake_timeout_ns: how long a wake-up may go unanswered before it is given up.
    """

    def __init__(self, resend_interval_ns: int, wake_timeout_ns: int) -> None:
        self._resend_ns = resend_interval_ns
        self._wake_timeout_ns = wake_timeout_ns
        self._split = Lasting(resend_interval_ns)
        self._idle = Lasting(resend_interval_ns)
        self._waking_since_ns: int | None = None
        self._waking_wave = 0
        self._next_wake_ns = 0

    def events(
        self, now_ns: int, state: CoordinatorState, rows: Iterable[RowState], *, unobserved_ranks: int = 0
    ) -> list[CoordinatorEvent]:
        """The events that follow from what the rows show now, at most one of each kind.

        Args:
            now_ns: the time.
            state: the coordinator's machine.
            rows: what the live engines' rows say.
            unobserved_ranks: live ranks that have no such row (stock engines). While there are any, idle rows do
                not prove that the wave is over, only that these ranks do not run in it: they are called again.
        """
        rows = list(rows)
        running = [row for row in rows if row.running]
        wave = max((row.wave for row in rows), default=0)
        events = _seen_running(state, running)
        split = bool(running) and (len(running) < len(rows) or any(row.wave != running[0].wave for row in running))
        if self._split.holds(now_ns, split):
            events.append(RanksSplit(wave))
        idle = bool(rows) and not running and (state.phase is Phase.RUNNING or wave > state.wave)
        if self._idle.holds(now_ns, idle):
            self._idle.restart()
            events.append(RanksSplit(wave) if unobserved_ranks else RanksIdle(wave))
        return [*events, *self._wake_timer(now_ns, state, bool(running))]

    def _wake_timer(self, now_ns: int, state: CoordinatorState, is_running: bool) -> list[CoordinatorEvent]:
        """The event of a wake-up that no row has answered for long enough."""
        if state.phase is not Phase.WAKING:
            self._waking_since_ns = None
        elif self._waking_since_ns is None or self._waking_wave != state.wave:
            self._waking_since_ns, self._waking_wave = now_ns, state.wave
            self._next_wake_ns = now_ns + self._resend_ns
        elif now_ns >= self._next_wake_ns and not is_running:
            self._next_wake_ns = now_ns + self._resend_ns
            expired = now_ns - self._waking_since_ns >= self._wake_timeout_ns
            if expired:
                self._waking_since_ns = None  # the next wake-up may begin before the next look, in the same wave
            return [WakeTimer(expired)]
        return []


def _seen_running(state: CoordinatorState, running: list[RowState]) -> list[CoordinatorEvent]:
    """The event of a row that runs in a wave of which the coordinator does not know that it runs."""
    if not running:
        return []
    newest = max(running, key=lambda row: row.wave)
    # A row in an older wave says nothing: it is about to change, or the ranks are split.
    known = newest.wave < state.wave or (newest.wave == state.wave and state.phase is Phase.RUNNING)
    return [] if known else [SeenRunning(newest.dp_rank, newest.wave)]
