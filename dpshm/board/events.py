"""The events of a group: changes that the board recorded, and changes that a reader notices itself.

The board records every change of a mark, of the number of ranks and of the coordinator with its time. It keeps the
newest `dpshm.board.layout.CHANGES`, so a reader that comes later misses none of those. Waves are too frequent to
be recorded: a reader knows only how many ran between two reads. The board cannot record the end of a coordinator,
or of a rank while there is no coordinator. A reader notices these, and their time is the time of the read.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.words import (
    DRAINED,
    ON_BEHALF,
    REMOTE,
    VERDICT_MASK,
    Change,
    ChangeKind,
    unpack_change,
    unpack_control,
)
from dpshm.errors import SegmentError
from dpshm.rules.liveness import HANGING, Verdict
from dpshm.rules.waves import Phase

SILENT_AFTER_S = 1.0
"""A coordinator whose beat is older is silent. Twenty rounds of the watch thread."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened.

    Attributes:
        time: seconds since 1970.
        recorded: true if the coordinator recorded the time; false if it is the time of the read that noticed it.
        kind: one of `KINDS`, such as rank_died, wave_started or coordinator_gone.
        row: the rank or front-end; null for other events.
        value: the wave, the number of ranks, the epoch or a count, by kind.
        text: the event in words.
    """

    time: float
    recorded: bool
    group: str
    kind: str
    row: int | None = None
    value: int | None = None
    text: str


KINDS = (
    *("rank_joined", "rank_left", "rank_died", "rank_stalled", "rank_stuck", "rank_recovered"),
    *("rank_lost", "rank_heard"),
    *("rank_drained", "rank_undrained"),
    *("frontend_joined", "frontend_left", "frontend_died"),
    *("coordinator_started", "coordinator_gone", "coordinator_silent", "coordinator_back"),
    *("wave_waking", "wave_started", "wave_ended", "waves_unseen", "scaled", "changes_lost", "group_ended"),
)


class Waves(NamedTuple):
    """The waves as one read found them."""

    wave: int
    phase: Phase
    started: int


class Happened(NamedTuple):
    """An event without time and group."""

    kind: str
    row: int | None
    value: int | None
    text: str


def from_change(change: Change) -> list[Happened]:
    """The event of a recorded change."""
    match change.kind:
        case ChangeKind.COORDINATOR:
            words = "started" if change.after == 1 else f"took the live board over (epoch {change.after})"
            return [Happened("coordinator_started", None, change.after, f"coordinator {words}")]
        case ChangeKind.DP_SIZE:
            words = f"from {change.before} to" if change.before else "is"
            return [Happened("scaled", None, change.after, f"number of ranks {words} {change.after}")]
        case ChangeKind.FRONTEND:
            return _verdict("frontend", f"front-end {change.row}", change)
    found = _verdict("rank", f"rank {change.row}", change)
    was, is_ = bool(change.before & DRAINED), bool(change.after & DRAINED)
    if was != is_:
        kind, words = ("rank_drained", "was drained") if is_ else ("rank_undrained", "is back in routing")
        found.append(Happened(kind, change.row, None, f"rank {change.row} {words}"))
    return found


def _verdict(who: str, name: str, change: Change) -> list[Happened]:
    before, after = Verdict(change.before & VERDICT_MASK), Verdict(change.after & VERDICT_MASK)
    if before is after:
        return []
    match before, after:
        case _, Verdict.DEAD:
            kind, words = "died", "died: its process is gone"
        case _, Verdict.ABSENT:
            kind, words = "left", "left in good order"
        case _, Verdict.STALLED:
            kind, words = "stalled", "stalled: it has work, and shows no sign of life"
        case _, Verdict.STUCK:
            kind, words = "stuck", "is stuck: it has work and shows signs of life, and finishes nothing"
        case _, Verdict.UNKNOWN:
            kind, words = "lost", "is on another node, and nothing was heard of it for a moment"
        case Verdict.UNKNOWN, _:
            kind, words = "heard", "is heard again"
        case ((Verdict.STALLED | Verdict.STUCK), _):
            kind, words = "recovered", "moves again"
        case Verdict.DEAD, _:
            kind, words = "joined", "is back in a new process"
        case _:
            kind, words = "joined", "joined"
    return [Happened(f"{who}_{kind}", change.row, None, f"{name} {words}")]


def from_waves(before: Waves, after: Waves) -> list[Happened]:
    """The wave events between two reads."""
    found = []
    began = after.phase is Phase.RUNNING and (before.phase is not Phase.RUNNING or before.wave != after.wave)
    unrecorded = after.started - before.started - int(began)
    if unrecorded > 0:
        what = "wave" if unrecorded == 1 else "waves"
        found.append(
            Happened("waves_unseen", None, unrecorded, f"{unrecorded} more {what} began between two reads")
        )
    if began:
        found.append(Happened("wave_started", None, after.wave, f"wave {after.wave} runs"))
    elif after.phase is Phase.WAKING and before.phase is not Phase.WAKING:
        found.append(Happened("wave_waking", None, after.wave, f"ranks are woken for wave {after.wave}"))
    elif after.phase is Phase.PAUSED and (before.phase is not Phase.PAUSED or before.wave != after.wave):
        text = f"all ranks are idle and paused; the next wave is {after.wave}"
        found.append(Happened("wave_ended", None, after.wave, text))
    return found


def read_changes(board: Board, after: int) -> tuple[list[tuple[Change, int]], int, int]:
    """The recorded changes after a revision.

    Returns:
        The changes with their CLOCK_MONOTONIC times (ns), the newest revision, and how many were overwritten.
    """
    at_revision = board.index("revision")
    # SYNC: the revision, the records, the revision again: the writer stores a record, then the revision. The slot
    # after the newest may be in the making, so the oldest record counts only if that is not its slot.
    newest = board.words[at_revision]
    first = max(after + 1, newest - layout.CHANGES + 1)
    raw = []
    for revision in range(first, newest + 1):
        slot = revision % layout.CHANGES
        raw.append((revision, int(board.change[slot]), int(board.change_time[slot])))
    oldest = board.words[at_revision] + 2 - layout.CHANGES
    found = []
    for revision, word, time_ns in raw:
        change = unpack_change(word)
        if revision >= oldest and change.revision == revision & 0xFFFF:
            found.append((change, time_ns))
    return found, newest, newest - after - len(found)


class EventReader:
    """Reads a group's events.

    Args:
        board: attached read-only; `close` closes it.
        history: whether the first `read` returns the changes that were recorded before it.
        any_owner: follow the group to a board of another user too. Only for tools.
    """

    def __init__(self, board: Board, *, history: bool = True, any_owner: bool = False) -> None:
        self.board = board
        self._any_owner = any_owner
        self._begin(history=history)

    def _begin(self, *, history: bool) -> None:
        self._revision = 0 if history else int(self.board.revision[0])
        self._waves: Waves | None = None
        self._coordinator: str | None = None
        self._noticed_dead: set[int] = set()
        self._ended = False

    def read(self) -> list[Event]:
        """The events since the last call, the oldest first."""
        self.board.segment.refresh()
        now, now_ns = time.time(), time.monotonic_ns()
        events = self._recorded(now, now_ns)
        noticed = [*self._of_coordinator(now_ns), *self._of_waves(), *self._of_ranks(), *self._of_segment()]
        return events + [self._event(now, False, happened) for happened in noticed]

    def _event(self, when: float, recorded: bool, happened: Happened) -> Event:
        group = self.board.segment.group
        return Event(
            time=when,
            recorded=recorded,
            group=group,
            kind=happened.kind,
            row=happened.row,
            value=happened.value,
            text=happened.text,
        )

    def _recorded(self, now: float, now_ns: int) -> list[Event]:
        first = self._revision == 0
        changes, self._revision, lost = read_changes(self.board, self._revision)
        events = []
        if lost > 0:
            text = f"{lost} {'older' if first else 'more'} changes are not recorded any more"
            events.append(self._event(now, False, Happened("changes_lost", None, lost, text)))
        dated = self.board.clocks_agree()
        for change, time_ns in changes:
            for happened in from_change(change):
                if happened.kind == "rank_died" and happened.row in self._noticed_dead:
                    continue
                when = now - (now_ns - time_ns) / 1e9 if dated else now
                events.append(self._event(when, dated, happened))
        return events

    def _of_coordinator(self, now_ns: int) -> list[Happened]:
        board, before = self.board, self._coordinator
        pid, epoch = int(board.coordinator_pid[0]), int(board.epoch[0])
        if not board.coordinator_alive():
            state = "gone"
        else:
            silent_ns = now_ns - int(board.coordinator_beat[0])
            state = "silent" if board.clocks_agree() and silent_ns > SILENT_AFTER_S * 1e9 else "alive"
        self._coordinator = state
        if state == before or (before in (None, "gone") and state == "alive"):
            return []  # that one started is recorded
        if state == "gone":
            text = f"coordinator pid {pid} is gone; routing goes on from the board"
            return [Happened("coordinator_gone", None, epoch, text)]
        if state == "silent":
            return [Happened("coordinator_silent", None, epoch, f"coordinator pid {pid} is stopped or hangs")]
        return [Happened("coordinator_back", None, epoch, f"coordinator pid {pid} moves again")]

    def _of_waves(self) -> list[Happened]:
        board = self.board
        before = self._waves
        self._waves = Waves(*unpack_control(int(board.control[0])), int(board.waves_started[0]))
        return [] if before is None else from_waves(before, self._waves)

    def _of_ranks(self) -> list[Happened]:
        """The deaths of ranks while there is no coordinator: ranks whose lock is free."""
        if self._coordinator != "gone":
            self._noticed_dead.clear()
            return []
        board, found = self.board, []
        for e, mark in enumerate(board.engine_mark[: board.dp_size].tolist()):
            verdict = Verdict(mark & VERDICT_MASK)
            dead = verdict in (Verdict.ALIVE, *HANGING) and not mark & (ON_BEHALF | REMOTE)
            if dead and e not in self._noticed_dead and not board.engine_alive(e):
                self._noticed_dead.add(e)
                found.append(Happened("rank_died", e, None, f"rank {e} died: its process is gone"))
        return found

    def _of_segment(self) -> list[Happened]:
        """The group's end, and later the start of the next group of the same name."""
        if self.board.segment.linked:
            return []
        if not self._ended:
            self._ended = True
            return [Happened("group_ended", None, None, "the group has ended, or its segment was unlinked")]
        try:
            new = Board.attach(self.board.segment.group, any_owner=self._any_owner)
        except SegmentError:
            return []
        self.board.close()
        self.board = new
        self._begin(history=True)
        return []

    def close(self) -> None:
        """Lets go of the board."""
        self.board.close()

    def __enter__(self) -> EventReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
