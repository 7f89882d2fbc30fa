"""What the rows of the board say about the waves, whatever became of the messages.

Pure but for a memory: how long the rows have said the same. The wave thread calls `WaveReconciler.look` with what
it read and the time, and feeds the events that come back to `dpshm.rules.waves.handle_coordinator`.

Only rows of dpshm's own engines are evidence; a stock engine's row shows its queues, not whether it steps.
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


class WaveReconciler:
    """Turns what rows show, and for how long, into events; and keeps the timer of a wake-up.

    Args:
        resend_interval_ns: how long a disagreement, an idle group or an unanswered START may last.
        wake_timeout_ns: how long a wake-up may go unanswered before it is given up.
    """

    def __init__(self, resend_interval_ns: int, wake_timeout_ns: int) -> None:
        self._resend_ns = resend_interval_ns
        self._wake_timeout_ns = wake_timeout_ns
        self._split_since_ns: int | None = None
        self._idle_since_ns: int | None = None
        self._waking_since_ns: int | None = None
        self._waking_wave = 0
        self._next_wake_ns = 0

    def look(
        self, now_ns: int, state: CoordinatorState, rows: Iterable[RowState], *, unobserved_ranks: int = 0
    ) -> list[CoordinatorEvent]:
        """The events that this look gives rise to, at most one of each kind.

        Args:
            now_ns: the time.
            state: the coordinator's machine.
            rows: what the live engines' rows say.
            unobserved_ranks: live ranks that have no such row (stock engines). While there are any, idle rows do
                not
                prove that the wave is over, only that these ranks do not run in it: they are called again.
        """
        rows = list(rows)
        running = [row for row in rows if row.running]
        wave = max((row.wave for row in rows), default=0)
        events: list[CoordinatorEvent] = []

        if running:
            newest = max(running, key=lambda row: row.wave)
            # In an older wave it says nothing: the row is about to change, or the ranks are split.
            if newest.wave > state.wave or (newest.wave == state.wave and state.phase is not Phase.RUNNING):
                events.append(SeenRunning(newest.dp_rank, newest.wave))

        split = bool(running) and (len(running) < len(rows) or any(row.wave != running[0].wave for row in running))
        self._split_since_ns = _since(self._split_since_ns, now_ns, split)
        if self._split_since_ns is not None and now_ns - self._split_since_ns >= self._resend_ns:
            self._split_since_ns = now_ns
            events.append(RanksSplit(wave))

        idle = bool(rows) and not running and (state.phase is Phase.RUNNING or wave > state.wave)
        self._idle_since_ns = _since(self._idle_since_ns, now_ns, idle)
        if self._idle_since_ns is not None and now_ns - self._idle_since_ns >= self._resend_ns:
            self._idle_since_ns = None
            events.append(RanksSplit(wave) if unobserved_ranks else RanksIdle(wave))

        if state.phase is not Phase.WAKING:
            self._waking_since_ns = None
        elif self._waking_since_ns is None or self._waking_wave != state.wave:
            self._waking_since_ns, self._waking_wave = now_ns, state.wave
            self._next_wake_ns = now_ns + self._resend_ns
        elif now_ns >= self._next_wake_ns and not running:
            self._next_wake_ns = now_ns + self._resend_ns
            events.append(WakeTimer(expired=now_ns - self._waking_since_ns >= self._wake_timeout_ns))
        return events


def _since(since_ns: int | None, now_ns: int, holds: bool) -> int | None:
    """Since when something has held without a break; None while it does not."""
    if not holds:
        return None
    return now_ns if since_ns is None else since_ns
